"""Slots: admit, run an epoch, release, export and import one slot's state."""

from momentum_tuner.trainer.slots import SlotState, TrialSettings
from momentum_tuner.trainer.trainer import ScheduleSettings, Trainer

__all__ = ["ScheduleSettings", "SlotState", "Trainer", "TrialSettings"]
