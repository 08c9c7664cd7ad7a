"""What people ask about a study: how far it is, who works on it, which settings won so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from momentum_tuner.database import Database, Study, Ticket, Worker, database_now, plain_number
from momentum_tuner.tickets.studies import StudyRecord
from momentum_tuner.worker_options import GRACE_SECONDS


@dataclass(frozen=True)
class BestSetting:
    """The best completed search trial of one optimizer.

    Attributes:
        study: the study's name.
        optimizer: the optimizer.
        trial: its number in Optuna's study.
        objective: the objective's value.
        settings: all hyperparameters it trained with.
        measures: its final measures.
    """

    study: str
    optimizer: str
    trial: int
    objective: float
    settings: Mapping[str, Any]
    measures: Mapping[str, Any]

    def flat(self) -> dict[str, Any]:
        """One flat mapping of JSON values: study, optimizer, trial, objective, hyperparameters, measures."""
        head = {"study": self.study, "optimizer": self.optimizer, "trial": self.trial, "objective": self.objective}
        found = {**self.measures, **self.settings, **head}
        names = dict.fromkeys((*head, *self.settings, *self.measures))
        return {name: plain_number(found[name]) for name in names}


@dataclass(frozen=True)
class OptimizerProgress:
    """How far one optimizer's tickets are; `complete`, `pruned`, `diverged` and `failed` add up to `done`."""

    optimizer: str
    tickets: int
    done: int
    running: int
    complete: int
    pruned: int
    diverged: int
    failed: int
    best: float | None
    best_setting: Mapping[str, Any] | None


@dataclass(frozen=True)
class WorkerProgress:
    """One worker of the study, by the database's clock."""

    id: str
    host: str
    node: str
    device: str
    slots: int
    state: str
    heartbeat_age_s: float


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is."""

    study: str
    phase: str
    optimizers: tuple[OptimizerProgress, ...]
    workers: tuple[WorkerProgress, ...]

    @property
    def tickets(self) -> int:
        """All tickets of the study."""
        return sum(o.tickets for o in self.optimizers)

    @property
    def done(self) -> int:
        """Those with a result."""
        return sum(o.done for o in self.optimizers)

    def flat(self) -> dict[str, Any]:
        """As plain JSON values."""
        found = asdict(self)
        for optimizer in found["optimizers"]:
            setting = optimizer["best_setting"]
            if setting is not None:
                optimizer["best_setting"] = {name: plain_number(value) for name, value in setting.items()}
        return {**found, "optimizers": list(found["optimizers"]), "workers": list(found["workers"])}


def study_progress(database: Database, study: StudyRecord) -> StudyProgress:
    """Count the study's tickets and list its workers; those that ended are left out."""
    best = {b.optimizer: b for b in best_settings(database, study)}
    counts: dict[str, dict[str, int]] = {o: {} for o in study.spec.optimizers}
    with database.read() as session:
        phase = session.scalar(sa.select(Study.phase).where(Study.id == study.id)) or study.phase
        kinds = session.execute(
            sa.select(Ticket.optimizer, Ticket.state, Ticket.outcome, sa.func.count())
            .where(Ticket.study_id == study.id, Ticket.kind == "search")
            .group_by(Ticket.optimizer, Ticket.state, Ticket.outcome)
        )
        for optimizer, state, outcome, count in kinds:
            found = counts[optimizer]
            for name in ("tickets", state, outcome if state == "done" else None):
                if name is not None:
                    found[name] = found.get(name, 0) + count
        now = session.scalar(sa.select(database_now())) or 0.0
        rows = session.scalars(
            sa.select(Worker).where(Worker.study_id == study.id, Worker.state != "stopped").order_by(Worker.started_at)
        )
        workers = tuple(
            WorkerProgress(
                id=w.id,
                host=w.host,
                node=w.node,
                device=w.device,
                slots=w.slots,
                state=w.state if now - w.heartbeat < GRACE_SECONDS else "lost",
                heartbeat_age_s=round(max(0.0, now - w.heartbeat), 1),
            )
            for w in rows
        )
    optimizers = tuple(
        OptimizerProgress(
            optimizer=optimizer,
            tickets=found.get("tickets", 0),
            done=found.get("done", 0),
            running=found.get("running", 0) + found.get("finishing", 0),
            complete=found.get("complete", 0),
            pruned=found.get("pruned", 0),
            diverged=found.get("diverged", 0),
            failed=found.get("failed", 0),
            best=best[optimizer].objective if optimizer in best else None,
            best_setting={"trial": best[optimizer].trial, **best[optimizer].settings} if optimizer in best else None,
        )
        for optimizer, found in counts.items()
    )
    return StudyProgress(study.name, phase, optimizers, workers)


def best_settings(database: Database, study: StudyRecord, *, contestants: bool = False) -> list[BestSetting]:
    """The best completed search trial of each optimizer, best first; ties go to the earlier trial.

    Args:
        database: the tickets.
        study: whose.
        contestants: whether the reference is among them where the study does not name it, from a search of its own.
    """
    maximize = study.spec.objective.direction == "maximize"
    found: list[BestSetting] = []
    with database.read() as session:
        for optimizer in study.spec.contestants if contestants else study.spec.optimizers:
            row = session.scalars(
                sa.select(Ticket)
                .where(
                    Ticket.study_id == study.id,
                    Ticket.optimizer == optimizer,
                    Ticket.kind == ("search" if optimizer in study.spec.optimizers else "reference"),
                    Ticket.outcome == "complete",
                    Ticket.state == "done",
                    Ticket.value.is_not(None),
                )
                .order_by(Ticket.value.desc() if maximize else Ticket.value, Ticket.trial_number)
                .limit(1)
            ).one_or_none()
            if row is not None and row.value is not None and row.trial_number is not None:
                found.append(
                    BestSetting(
                        study.name, optimizer, row.trial_number, row.value, row.settings or {}, row.measures or {}
                    )
                )
    return sorted(found, key=lambda b: -b.objective if maximize else b.objective)
