"""MLflow as a view of the database, which can be rebuilt from it at any time."""

from momentum_tuner.tracking.loop import PublisherLoop
from momentum_tuner.tracking.publisher import PassResult, Publisher, short_reason
from momentum_tuner.tracking.runs import run_name, short_momentum
from momentum_tuner.tracking.shown import is_shown
from momentum_tuner.tracking.store import check_tracking_uri, is_refusal, quiet_mlflow

__all__ = [
    "PassResult",
    "Publisher",
    "PublisherLoop",
    "check_tracking_uri",
    "is_refusal",
    "is_shown",
    "quiet_mlflow",
    "run_name",
    "short_momentum",
    "short_reason",
]
