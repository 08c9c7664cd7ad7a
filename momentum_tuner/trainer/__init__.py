"""Slots: admit, run an epoch, release, export and import one slot's state."""

from momentum_tuner.trainer.calibration import Calibration, Way
from momentum_tuner.trainer.layout import fill_model
from momentum_tuner.trainer.loop import LoopTrainer, trainer_of
from momentum_tuner.trainer.memory import SlotsOutOfMemoryError, UnfinishedStepError, is_out_of_memory
from momentum_tuner.trainer.patience import AbandonedError
from momentum_tuner.trainer.state import SlotState, TrialSettings
from momentum_tuner.trainer.trainer import FUSED_WIDTH, ScheduleSettings, Trainer

__all__ = [
    "FUSED_WIDTH",
    "AbandonedError",
    "Calibration",
    "LoopTrainer",
    "ScheduleSettings",
    "SlotState",
    "SlotsOutOfMemoryError",
    "Trainer",
    "TrialSettings",
    "UnfinishedStepError",
    "Way",
    "fill_model",
    "is_out_of_memory",
    "trainer_of",
]
