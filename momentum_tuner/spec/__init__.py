"""The study file: what it may hold, read safely, and every mistake in it told in one report."""

from momentum_tuner.spec.sections import (
    OBJECTIVES,
    Aim,
    BudgetSpec,
    ConfirmSpec,
    ObjectiveSpec,
    PrunerSpec,
    SamplerSpec,
    ScheduleSpec,
    TaskSpec,
)
from momentum_tuner.spec.settings import BATCH_SIZE, Range, Setting, grid_axis
from momentum_tuner.spec.study import StudySpec, check_study, differences, load_study, parse_study, spec_hash

__all__ = [
    "BATCH_SIZE",
    "OBJECTIVES",
    "Aim",
    "BudgetSpec",
    "ConfirmSpec",
    "ObjectiveSpec",
    "PrunerSpec",
    "Range",
    "SamplerSpec",
    "ScheduleSpec",
    "Setting",
    "StudySpec",
    "TaskSpec",
    "check_study",
    "differences",
    "grid_axis",
    "load_study",
    "parse_study",
    "spec_hash",
]
