"""Studies as they are in the database once trials have ended, written row by row so that a test knows every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from momentum_tuner.database import Database, Epoch, Study, Ticket
from momentum_tuner.spec import StudySpec, spec_hash
from momentum_tuner.tickets import StudyRecord, find_study

EPOCH_STEPS = 100


def _epoch_steps(settings: Mapping[str, Any]) -> int:
    return int(EPOCH_STEPS * 64 // settings["batch_size"])


@dataclass
class Recorded:
    """A study whose trials are written by hand; an epoch has 100 steps of 64 examples.

    Args:
        database: where to.
        spec: the study.
        phase: which it is in.
    """

    database: Database
    spec: StudySpec
    phase: str = "done"
    id: int = 0
    positions: dict[tuple[str, str], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        text = self.spec.canonical()
        with self.database.write() as session:
            row = Study(
                name=self.spec.name, spec=text, spec_hash=spec_hash(self.spec), phase=self.phase, created_at=0.0
            )
            session.add(row)
            session.flush()
            self.id = row.id

    @property
    def record(self) -> StudyRecord:
        return find_study(self.database, self.spec.name)

    def search(
        self,
        optimizer: str,
        value: float | None,
        learning_rate: float = 0.1,
        momentum: float | None = None,
        outcome: str = "complete",
        batch_size: int = 64,
        dampening: float | None = None,
        **measures: Any,
    ) -> dict[str, Any]:
        """Add a search trial (of the reference's own search, if the study does not name it); returns its settings."""
        settings: dict[str, Any] = {"learning_rate": learning_rate, "clip_norm": float("inf"), "batch_size": batch_size}
        if momentum is not None:
            settings["momentum"] = momentum
        if dampening is not None:
            settings["dampening"] = dampening
        kind = "search" if optimizer in self.spec.optimizers else "reference"
        steps = _epoch_steps(settings) * self.spec.budget.epochs
        self._add(optimizer, kind, 0, settings, outcome, value, {"steps": steps, **measures}, ())
        return settings

    def confirm(
        self,
        optimizer: str,
        settings: Mapping[str, Any],
        seed: int,
        losses: Sequence[float | None],
        outcome: str = "complete",
        accuracies: Sequence[float] | None = None,
        **measures: Any,
    ) -> None:
        """Add a confirmation trial with the validation losses of epochs 0, 1, ...; a diverged one ends in its last."""
        rows = []
        epoch_steps = _epoch_steps(settings)
        for epoch, loss in enumerate(losses):
            last = outcome == "diverged" and epoch == len(losses) - 1
            rows.append(
                {
                    "epoch": epoch,
                    "step": epoch_steps * epoch - (50 if last else 0),
                    "recorded_at": 0.0,
                    "valid_loss": loss,
                    "diverged_at_step": epoch_steps * epoch - 50 if last else None,
                    "metrics": {} if accuracies is None else {"accuracy": accuracies[epoch]},
                }
            )
        known = [loss for loss in losses[1:] if loss is not None]
        value = losses[0] if outcome == "diverged" else min(known, default=None)
        found = {"initial_valid_loss": losses[0], "best_valid_loss": min(known, default=None), "spikes": 0, **measures}
        self._add(optimizer, "confirm", seed, settings, outcome, value, found, rows)

    def reach(
        self, optimizer: str, settings: Mapping[str, Any], steps: Mapping[int, float | None], **more: Any
    ) -> None:
        """Add confirmation trials whose loss falls from 1 and is 0.5 after so many steps; None never falls."""
        epochs = self.spec.budget.epochs
        for seed, reached in steps.items():
            falls = 0.0 if reached is None else 0.5 * _epoch_steps(settings) / reached
            self.confirm(optimizer, settings, seed, [1.0 - falls * epoch for epoch in range(epochs + 1)], **more)

    def _add(
        self,
        optimizer: str,
        kind: str,
        seed: int,
        settings: Mapping[str, Any],
        outcome: str,
        value: float | None,
        measures: Mapping[str, Any],
        epochs: Sequence[Mapping[str, Any]],
    ) -> None:
        position = self.positions.get((optimizer, kind), 0)
        self.positions[optimizer, kind] = position + 1
        with self.database.write() as session:
            ticket = Ticket(
                study_id=self.id,
                optimizer=optimizer,
                kind=kind,
                position=position,
                queue_order=position,
                seed=seed,
                settings=dict(settings),
                trial_id=position,
                trial_number=position,
                state="done",
                outcome=outcome,
                value=value,
                measures={name: v for name, v in measures.items() if v is not None},
            )
            session.add(ticket)
            session.flush()
            session.add_all(Epoch(ticket_id=ticket.id, **row) for row in epochs)
