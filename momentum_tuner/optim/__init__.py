"""Update rules and schedules: pure functions that train every slot of a batch at its own settings."""

from momentum_tuner.optim.rules import (
    OPTIONAL_HYPERPARAMETERS,
    RULES,
    Rule,
    clip_scale,
    lookahead_point,
)
from momentum_tuner.optim.schedules import Schedule, make_schedule

__all__ = [
    "OPTIONAL_HYPERPARAMETERS",
    "RULES",
    "Rule",
    "Schedule",
    "clip_scale",
    "lookahead_point",
    "make_schedule",
]
