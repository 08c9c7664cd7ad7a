"""All that a report shows of a study, read from the database once."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from momentum_tuner.comparison import Comparison, StabilityMap, compare_study, stability_map
from momentum_tuner.comparison.confirmation import read_confirmation, read_curves
from momentum_tuner.database import Database, Study, Ticket, Worker, database_now
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.report.importance import Importance, importances
from momentum_tuner.report.trajectories import Plane, trajectories
from momentum_tuner.report.trials import TrialRow, read_trials
from momentum_tuner.spec import StudySpec
from momentum_tuner.tickets import BestSetting, StudyProgress, StudyRecord, best_settings, read_epochs, study_progress

Curves = Mapping[str, Mapping[int, Sequence[EpochRecord]]]


@dataclass(frozen=True)
class Machine:
    """A worker that trained trials of the study."""

    worker: str
    node: str
    device: str
    started_at: float
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """What is known of a study.

    Attributes:
        study: the study.
        source: the database, as people may see it.
        created_at: seconds since 1970.
        finished_at: the same, once it is done.
        read_at: when the database was read, by its clock.
        data: what the trials learn from, as the first worker found it.
        progress: how far it is.
        comparison: the verdict, as far as there is one.
        best: the best setting of each contestant, the best first; with two aims the best in the first.
        fronts: with two aims, the numbers of the trials that no other is better than, by contestant.
        trials: all trials.
        confirmed: curves of the confirmation by contestant and seed; the fastest contestant first.
        searched: where nothing is confirmed, the curve of each best search trial, likewise.
        maps: the stability map of each contestant.
        importances: of the hyperparameters of each contestant.
        machines: workers in the order in which they began.
        plane: paths over a landscape of two parameters.
    """

    study: StudyRecord
    source: str
    created_at: float
    finished_at: float | None
    read_at: float
    data: Mapping[str, Any] | None
    progress: StudyProgress
    comparison: Comparison
    best: Sequence[BestSetting]
    fronts: Mapping[str, set[int]]
    trials: Sequence[TrialRow]
    confirmed: Curves
    searched: Curves
    maps: Sequence[StabilityMap]
    importances: Sequence[Importance]
    machines: Sequence[Machine]
    plane: Plane | None

    @property
    def spec(self) -> StudySpec:
        """The study file."""
        return self.study.spec

    @property
    def phase(self) -> str:
        """`search`, `confirm` or `done`, as the database had it."""
        return self.progress.phase

    @property
    def curves(self) -> Curves:
        """The confirmation's, or the search's where there is none."""
        return self.confirmed or self.searched


def gather(database: Database, study: StudyRecord, trusted: Collection[str] = ()) -> Evidence:
    """Read all that a report shows.

    Args:
        database: where the study is.
        study: the study, in any phase.
        trusted: what may be imported to train paths over a landscape again; built-in tasks always are.
    """
    found = best_settings(database, study, contestants=True)
    fronts: dict[str, set[int]] = {}
    best: dict[str, BestSetting] = {}
    for one in found:
        fronts.setdefault(one.optimizer, set()).add(one.trial)
        best.setdefault(one.optimizer, one)
    comparison = compare_study(database, study)
    order = [c.optimizer for c in comparison.optimizers if c.optimizer in best]
    confirmed: dict[str, Mapping[int, Sequence[EpochRecord]]] = {}
    for optimizer in order:
        curves = read_curves(database, read_confirmation(database, study, best[optimizer]))
        if curves:
            confirmed[optimizer] = curves
    trials = read_trials(database, study)
    searched = {} if confirmed else _searched(database, [best[o] for o in order], trials)
    with database.read() as session:
        row = session.get(Study, study.id)
        now = session.scalar(sa.select(database_now())) or 0.0
    seeds = sorted({seed for curves in confirmed.values() for seed in curves})
    return Evidence(
        study=study,
        source=database.shown,
        created_at=study.created_at,
        finished_at=row.finished_at if row is not None else None,
        read_at=now,
        data=row.data if row is not None else None,
        progress=study_progress(database, study),
        comparison=comparison,
        best=list(best.values()),
        fronts=fronts,
        trials=trials,
        confirmed=confirmed,
        searched=searched,
        maps=[stability_map(database, study, optimizer) for optimizer in study.spec.contestants],
        importances=importances(database, study),
        machines=_machines(database, study),
        plane=(
            trajectories(study, [best[o] for o in order], seeds[0] if seeds else study.spec.seed, trusted)
            if row is None or (row.data or {}).get("kind", "landscape") == "landscape"
            else None
        ),
    )


def _searched(database: Database, best: Sequence[BestSetting], trials: Sequence[TrialRow]) -> Curves:
    """The curve of each best search trial."""
    tickets = {(t.optimizer, t.number): t for t in trials if t.kind != "confirm"}
    mine = {b.optimizer: tickets[b.optimizer, b.trial] for b in best if (b.optimizer, b.trial) in tickets}
    records = read_epochs(database, [t.ticket for t in mine.values()])
    return {optimizer: {t.seed: records[t.ticket]} for optimizer, t in mine.items()}


def _machines(database: Database, study: StudyRecord) -> list[Machine]:
    workers = sa.select(Ticket.worker_id).where(Ticket.study_id == study.id).distinct()
    with database.read() as session:
        rows = session.scalars(sa.select(Worker).where(Worker.id.in_(workers)).order_by(Worker.started_at, Worker.id))
        return [Machine(w.id, w.node, w.device, w.started_at, w.environment or {}) for w in rows]
