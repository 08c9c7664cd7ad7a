"""A ticket in a worker's hands, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from momentum_tuner.checkpoints import Reference
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.tickets import Claim, Result


class Stage(Enum):
    """What comes next for a held ticket. Each step can be repeated, so that a lost connection loses nothing."""

    CLAIMED = auto()
    """Ask Optuna, and admit the trial to a slot."""
    TRAINING = auto()
    """Its trial has a slot of the trainer."""
    ENDED = auto()
    """It has a result: fence it."""
    FENCED = auto()
    """The result is in the database: tell Optuna."""
    TOLD = auto()
    """Optuna knows: the ticket is done."""
    RETURNING = auto()
    """It left its slot before its end: give the ticket back."""


@dataclass
class Held:
    """A ticket that this worker holds.

    Attributes:
        claim: the ticket, and the fence.
        stage: what comes next.
        slot: the number of the slot that its trial took.
        noted: whether its ticket knows its Optuna trial and its slot.
        last_attempt: whether the ticket fails if this worker dies before its trial has come further.
        records: the trial's records so far.
        written: how many of them the database has.
        recorded: what the database had of a trial that goes on, by epoch; these records hold.
        reported: the rungs at which it has reported to Optuna.
        judged: the epoch after which the pruner was last asked.
        position: epochs, and steps of the next one, to which it came before it took its slot.
        references: its checkpoints, newest first.
        result: what became of it.
        asked: whether Optuna may have been asked already.
    """

    claim: Claim
    stage: Stage
    slot: int = 0
    noted: bool = False
    last_attempt: bool = False
    records: list[EpochRecord] = field(default_factory=list)
    written: int = 0
    recorded: dict[int, EpochRecord] = field(default_factory=dict)
    reported: set[int] = field(default_factory=set)
    judged: int = -1
    position: tuple[int, int] = (0, 0)
    references: list[Reference] = field(default_factory=list)
    result: Result | None = None
    asked: bool = False

    def add(self, record: EpochRecord) -> None:
        """Add an epoch's record; one that the database has already holds in its place, unless the trial diverged."""
        known = self.recorded.pop(record.epoch, None)
        self.records.append(record if known is None or record.diverged_at_step is not None else known)

    def end(self, result: Result) -> None:
        """Note the result."""
        self.result, self.stage = result, Stage.ENDED
