"""Workers as actors on a Ray cluster. Importing this needs the extra `ray`."""

from momentum_tuner.errors import MissingExtraError

try:
    import ray as _  # noqa: F401
except ImportError:
    raise MissingExtraError("--engine ray needs the extra 'ray': pip install 'momentum-tuner[ray]'") from None

from momentum_tuner.launcher.ray.cluster import Demand, Node
from momentum_tuner.launcher.ray.workers import RayOptions, RayWorkers

__all__ = ["Demand", "Node", "RayOptions", "RayWorkers"]
