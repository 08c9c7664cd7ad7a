"""MLflow as a view of the database, which can be rebuilt from it at any time."""

from momentum_tuner.tracking.publisher import (
    DEFAULT_TRACKING_URI,
    PassResult,
    Publisher,
    PublisherLoop,
    check_tracking_uri,
    quiet_mlflow,
    short_reason,
)
from momentum_tuner.tracking.runs import run_name, short_momentum

__all__ = [
    "DEFAULT_TRACKING_URI",
    "PassResult",
    "Publisher",
    "PublisherLoop",
    "check_tracking_uri",
    "quiet_mlflow",
    "run_name",
    "short_momentum",
    "short_reason",
]
