"""The confirmation trials of each contestant's best setting, as the database holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from momentum_tuner.database import Database, Ticket
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.tickets import BestSetting, StudyRecord, read_epochs

_RELATIVE, _ABSOLUTE = 1e-9, 1e-12  # what a setting may lose on its way through Optuna, as 1 - momentum


@dataclass(frozen=True)
class ConfirmedTrial:
    """One confirmation trial that ended in a result.

    Attributes:
        ticket_id: its ticket.
        seed: fixes initial weights and data order, the same for every contestant.
        diverged: whether it diverged.
        value: the objective's value.
        measures: its final measures.
    """

    ticket_id: int
    seed: int
    diverged: bool
    value: float | None
    measures: Mapping[str, Any]


@dataclass(frozen=True)
class Confirmation:
    """The confirmation of one contestant's best setting.

    Attributes:
        best: the setting, and the trial that found it.
        trials: those that ended in a result, by seed, ascending.
        failed: how many failed.
    """

    best: BestSetting
    trials: Mapping[int, ConfirmedTrial]
    failed: int

    def numbers(self, measure: str) -> list[float]:
        """A measure of its trials, of those that have it."""
        return [float(t.measures[measure]) for t in self.trials.values() if t.measures.get(measure) is not None]


def read_confirmation(database: Database, study: StudyRecord, best: BestSetting) -> Confirmation:
    """The confirmation trials of a contestant's best setting.

    Those of a setting that was the best before the study grew are passed over.
    """
    with database.read() as session:
        rows = session.execute(
            sa.select(Ticket.id, Ticket.seed, Ticket.settings, Ticket.outcome, Ticket.value, Ticket.measures)
            .where(
                Ticket.study_id == study.id,
                Ticket.optimizer == best.optimizer,
                Ticket.kind == "confirm",
                Ticket.state == "done",
            )
            .order_by(Ticket.seed, Ticket.id)
        ).all()
    mine = [row for row in rows if same_setting(row.settings, best.settings)]
    trials = {
        row.seed: ConfirmedTrial(row.id, row.seed, row.outcome == "diverged", row.value, row.measures or {})
        for row in mine
        if row.outcome in ("complete", "diverged")
    }
    failed = {row.seed for row in mine if row.outcome == "failed"} - trials.keys()
    return Confirmation(best, trials, len(failed))


def read_curves(database: Database, confirmation: Confirmation) -> dict[int, Sequence[EpochRecord]]:
    """The epoch records of a contestant's confirmation trials, by seed."""
    found = read_epochs(database, [t.ticket_id for t in confirmation.trials.values()])
    return {seed: found[t.ticket_id] for seed, t in confirmation.trials.items()}


def same_setting(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    """Whether two trials trained with the same hyperparameters, up to the rounding of a way through Optuna."""
    if one is None or one.keys() != other.keys():
        return False
    return all(math.isclose(one[k], other[k], rel_tol=_RELATIVE, abs_tol=_ABSOLUTE) for k in one)
