"""What people ask about a study: how far it is, who works on it, which settings won so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from momentum_tuner.database import Database, Study, Ticket, Worker, database_now, plain_number
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets.studies import StudyRecord, search_kind
from momentum_tuner.worker_options import GRACE_SECONDS


@dataclass(frozen=True)
class BestSetting:
    """The best completed search trial of one contestant, or with two aims one of those that none is better than.

    Attributes:
        study: the study's name.
        optimizer: the optimizer.
        trial: its number in Optuna's study.
        objective: the objective's value, with two aims that of the first.
        settings: all hyperparameters it trained with.
        measures: its final measures.
        second_objective: the value of the second aim, if there is one.
    """

    study: str
    optimizer: str
    trial: int
    objective: float
    settings: Mapping[str, Any]
    measures: Mapping[str, Any]
    second_objective: float | None = None

    def flat(self) -> dict[str, Any]:
        """One flat mapping of JSON values: study, optimizer, trial, objective, hyperparameters, measures."""
        head = {"study": self.study, "optimizer": self.optimizer, "trial": self.trial, "objective": self.objective}
        if self.second_objective is not None:
            head["second_objective"] = self.second_objective
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
class KindProgress:
    """How far the tickets of one kind are."""

    tickets: int = 0
    done: int = 0
    running: int = 0


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
    """How far a study is.

    Attributes:
        study: its name.
        phase: `search`, `confirm` or `done`.
        optimizers: the search of each optimizer that the study file names.
        reference: the search of the reference, if the file does not name it.
        confirm: the confirmation of all contestants, once the search is complete.
        workers: who works on it.
    """

    study: str
    phase: str
    optimizers: tuple[OptimizerProgress, ...]
    reference: KindProgress
    confirm: KindProgress
    workers: tuple[WorkerProgress, ...]

    @property
    def tickets(self) -> int:
        """All tickets of the study so far."""
        return sum(o.tickets for o in self.optimizers) + self.reference.tickets + self.confirm.tickets

    @property
    def done(self) -> int:
        """Those with a result."""
        return sum(o.done for o in self.optimizers) + self.reference.done + self.confirm.done

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
    best = {b.optimizer: b for b in reversed(best_settings(database, study))}
    counts: dict[tuple[str, str], dict[str, int]] = {}
    with database.read() as session:
        phase = session.scalar(sa.select(Study.phase).where(Study.id == study.id)) or study.phase
        kinds = session.execute(
            sa.select(Ticket.kind, Ticket.optimizer, Ticket.state, Ticket.outcome, sa.func.count())
            .where(Ticket.study_id == study.id)
            .group_by(Ticket.kind, Ticket.optimizer, Ticket.state, Ticket.outcome)
        )
        for kind, optimizer, state, outcome, count in kinds:
            found = counts.setdefault((kind, optimizer), {})
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
        for optimizer in study.spec.optimizers
        for found in [counts.get(("search", optimizer), {})]
    )
    reference, confirm = (
        KindProgress(
            tickets=sum(found.get("tickets", 0) for found in these),
            done=sum(found.get("done", 0) for found in these),
            running=sum(found.get("running", 0) + found.get("finishing", 0) for found in these),
        )
        for these in ([f for (kind, _), f in counts.items() if kind == wanted] for wanted in ("reference", "confirm"))
    )
    return StudyProgress(study.name, phase, optimizers, reference, confirm, workers)


def best_settings(database: Database, study: StudyRecord, contestants: bool = False) -> list[BestSetting]:
    """The best completed search trial of each optimizer, best first; ties go to the earlier trial.

    With two aims, of each optimizer all trials than which none is better in both: its Pareto front.

    Args:
        database: the tickets.
        study: whose.
        contestants: whether the reference is among them that the study file does not name.
    """
    optimizers = study.spec.contestants if contestants else study.spec.optimizers
    sign = -1.0 if study.spec.objective.maximize else 1.0
    with database.read() as session:
        found = [best for o in optimizers for best in best_of(session, study.id, study.spec, o)]
    return sorted(found, key=lambda b: sign * b.objective)


def best_of(session: Session, study_id: int, spec: StudySpec, optimizer: str) -> list[BestSetting]:
    """The best completed search trial of one contestant, if it has one; with two aims its front, best first."""
    first, *others = spec.objective.aims
    wanted = (
        sa.select(Ticket)
        .where(
            Ticket.study_id == study_id,
            Ticket.optimizer == optimizer,
            Ticket.kind == search_kind(spec, optimizer),
            Ticket.outcome == "complete",
            Ticket.state == "done",
            Ticket.value.is_not(None),
            Ticket.trial_number.is_not(None),
        )
        .order_by(Ticket.value.desc() if first.maximize else Ticket.value, Ticket.trial_number)
    )
    if not others:
        rows = list(session.scalars(wanted.limit(1)))
    else:
        rows = _front(session.scalars(wanted.where(Ticket.second_value.is_not(None))), others[0].maximize)
    return [
        BestSetting(
            spec.name,
            optimizer,
            row.trial_number or 0,
            row.value or 0.0,
            row.settings or {},
            row.measures or {},
            row.second_value,
        )
        for row in rows
    ]


def _front(rows: Iterable[Ticket], maximize: bool) -> list[Ticket]:
    """Of trials ordered by the first aim those that are better in the second than all before them."""
    front: list[Ticket] = []
    for row in rows:
        value = row.second_value or 0.0
        if not front or _better(value, front[-1].second_value or 0.0, maximize):
            if front and front[-1].value == row.value:  # as good in the first aim, better in the second
                front.pop()
            front.append(row)
    return front


def _better(value: float, other: float, maximize: bool) -> bool:
    return value > other if maximize else value < other
