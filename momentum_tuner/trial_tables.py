"""Optuna's trials in the database, many at a time: its own storage reads and writes them one by one.

The tables are Optuna's, by its own models. `Search` refuses a database whose tables are of another version.
"""

from __future__ import annotations

import copy
import datetime
import functools
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.storages._rdb.models import (
    StudyModel,
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

_AT_ONCE = 10_000
"""Most ids in one statement."""


@dataclass
class TrialWrites:
    """What is to be written of running trials, by trial and name; the last value of a name holds.

    Attributes:
        params: internal values with their distributions, by parameter.
        reports: values reported, by step.
        system_attrs: by key.
        user_attrs: by key.
        ends: states of trials that end, with their values if they have any.
    """

    params: dict[tuple[int, str], tuple[float, BaseDistribution]] = field(default_factory=dict)
    reports: dict[tuple[int, int], float] = field(default_factory=dict)
    system_attrs: dict[tuple[int, str], Any] = field(default_factory=dict)
    user_attrs: dict[tuple[int, str], Any] = field(default_factory=dict)
    ends: dict[int, tuple[TrialState, Sequence[float] | None]] = field(default_factory=dict)

    @property
    def trial_ids(self) -> list[int]:
        """The trials that are written to, in order, so that whoever locks them does so in the same order."""
        parts = (self.params, self.reports, self.system_attrs, self.user_attrs)
        return sorted({trial_id for part in parts for trial_id, _ in part} | set(self.ends))


def find_study_id(session: Session, name: str) -> int | None:
    """The id of the Optuna study of that name, if there is one."""
    found: int | None = session.scalar(sa.select(StudyModel.study_id).where(StudyModel.study_name == name))
    return found


def read_trials(
    session: Session, after: Mapping[int, int], known: Collection[int] = (), but: Collection[int] = ()
) -> dict[int, list[FrozenTrial]]:
    """Trials as they are now, by Optuna's study, in the order of their ids; of those in `after` there may be none.

    Args:
        session: reads.
        after: by study, after which id all of its trials are wanted; -1 for all that it has.
        known: ids of trials that are wanted too, of any study.
        but: ids of trials after those that are not wanted.
    """
    columns = TrialModel.__table__.c
    trials = sa.select(
        columns.trial_id,
        columns.study_id,
        columns.number,
        columns.state,
        columns.datetime_start,
        columns.datetime_complete,
    )
    found: dict[int, sa.Row[Any]] = {}
    if after:  # in parts, as each finds its rows by an index; not everywhere would an OR
        newer = [trials.where(columns.study_id == i, columns.trial_id > last) for i, last in after.items()]
        found = {row.trial_id: row for row in session.execute(sa.union_all(*newer)) if row.trial_id not in but}
    for part in _parts(sorted(set(known) - found.keys())):
        found |= {row.trial_id: row for row in session.execute(trials.where(columns.trial_id.in_(part)))}
    rows = [found[trial_id] for trial_id in sorted(found)]
    ids = [row.trial_id for row in rows]
    params: dict[int, dict[str, Any]] = defaultdict(dict)
    distributions: dict[int, dict[str, BaseDistribution]] = defaultdict(dict)
    for trial_id, name, value, text in _read(
        session, ids, TrialParamModel.param_id, "param_name", "param_value", "distribution_json"
    ):
        distribution = _distribution(text)
        params[trial_id][name] = distribution.to_external_repr(value)
        distributions[trial_id][name] = distribution
    values: dict[int, dict[int, float]] = defaultdict(dict)
    for trial_id, objective, value, kind in _read(
        session, ids, TrialValueModel.trial_value_id, "objective", "value", "value_type"
    ):
        values[trial_id][objective] = TrialValueModel.stored_repr_to_value(value, kind)
    reports: dict[int, dict[int, float]] = defaultdict(dict)
    key = TrialIntermediateValueModel.trial_intermediate_value_id
    for trial_id, step, value, kind in _read(
        session, ids, key, "step", "intermediate_value", "intermediate_value_type"
    ):
        reports[trial_id][step] = TrialIntermediateValueModel.stored_repr_to_intermediate_value(value, kind)
    attrs: list[dict[int, dict[str, Any]]] = []
    for key in (TrialUserAttributeModel.trial_user_attribute_id, TrialSystemAttributeModel.trial_system_attribute_id):
        attrs.append(defaultdict(dict))
        for trial_id, name, text in _read(session, ids, key, "key", "value_json"):
            attrs[-1][trial_id][name] = json.loads(text)
    read: dict[int, list[FrozenTrial]] = {study_id: [] for study_id in after}
    for row in rows:
        read.setdefault(row.study_id, []).append(
            FrozenTrial(
                number=row.number,
                state=row.state,
                value=None,
                values=[values[row.trial_id][i] for i in range(len(values[row.trial_id]))] or None,
                datetime_start=_local(row.datetime_start),
                datetime_complete=_local(row.datetime_complete),
                params=params[row.trial_id],
                distributions=distributions[row.trial_id],
                user_attrs=attrs[0][row.trial_id],
                system_attrs=attrs[1][row.trial_id],
                intermediate_values=reports[row.trial_id],
                trial_id=row.trial_id,
            )
        )
    return read


def create_trials(session: Session, templates: Sequence[tuple[int, FrozenTrial]]) -> list[FrozenTrial]:
    """New running trials, in order, with the next numbers of their studies.

    Args:
        session: a transaction that writes.
        templates: of each the id of Optuna's study, and what it has from its beginning: parameters and user attributes.
    """
    study_ids = {study_id for study_id, _ in templates}
    # Locked as Optuna locks a study: numbers are counts. All in the same order, so that nobody waits in a circle.
    ours = sa.select(StudyModel.study_id).where(StudyModel.study_id.in_(study_ids)).order_by(StudyModel.study_id)
    missing = study_ids - set(session.scalars(ours.with_for_update()))
    if missing:
        raise KeyError(f"Optuna has no study {min(missing)}")
    mine = TrialModel.study_id.in_(study_ids)
    counts = sa.select(TrialModel.study_id, sa.func.count()).where(mine).group_by(TrialModel.study_id)
    numbers = dict.fromkeys(study_ids, 0) | {study_id: count for study_id, count in session.execute(counts)}
    last = session.scalar(sa.select(sa.func.max(TrialModel.trial_id))) or 0
    now = datetime.datetime.now(datetime.UTC)
    rows = []
    for study_id, _ in templates:
        rows.append({"study_id": study_id, "number": numbers[study_id]})
        numbers[study_id] += 1
    insert = sa.insert(TrialModel.__table__).values(state=TrialState.RUNNING, datetime_start=_stored(now))
    session.connection().execute(insert, rows)
    made = session.execute(
        sa.select(TrialModel.study_id, TrialModel.number, TrialModel.trial_id).where(mine, TrialModel.trial_id > last)
    )
    ids = {(study_id, number): trial_id for study_id, number, trial_id in made}
    writes, trials = TrialWrites(), []
    for row, (study_id, template) in zip(rows, templates, strict=True):
        trial = copy.copy(template)
        trial.number, trial.datetime_start = row["number"], _local(_stored(now))
        trial._trial_id = trial_id = ids[study_id, trial.number]
        trials.append(trial)
        for name, distribution in trial.distributions.items():
            writes.params[trial_id, name] = (distribution.to_internal_repr(trial.params[name]), distribution)
        writes.user_attrs |= {(trial_id, key): value for key, value in trial.user_attrs.items()}
    _write(session, writes, set(ids.values()), now)
    return trials


def ended(trial: FrozenTrial, state: TrialState, values: Sequence[float] | None, now: datetime.datetime) -> FrozenTrial:
    """A trial as the database has it once it has ended."""
    changed = copy.copy(trial)
    changed.state, changed.values = state, None if values is None else list(values)
    changed.datetime_complete = _local(_stored(now))
    return changed


def write_trials(session: Session, writes: TrialWrites, now: datetime.datetime) -> set[int]:
    """Write to running trials; returns those that are not running any more: nothing is written to these.

    Args:
        session: a transaction that writes.
        writes: what.
        now: when those end that end.
    """
    running: set[int] = set()
    for part in _parts(writes.trial_ids):
        found = (
            sa.select(TrialModel.trial_id, TrialModel.state)
            .where(TrialModel.trial_id.in_(part))
            .order_by(TrialModel.trial_id)
            .with_for_update()
        )
        running |= {trial_id for trial_id, state in session.execute(found) if state is TrialState.RUNNING}
    _write(session, writes, running, now)
    return set(writes.trial_ids) - running


def _write(session: Session, writes: TrialWrites, running: Collection[int], now: datetime.datetime) -> None:
    """Write to those trials that are running."""
    params = [
        {"trial_id": t, "param_name": name, "param_value": value, "distribution_json": distribution_to_json(d)}
        for (t, name), (value, d) in writes.params.items()
        if t in running
    ]
    _put(session, TrialParamModel, params)
    reports = []
    for (t, step), value in writes.reports.items():
        if t in running:
            stored, kind = TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
            reports.append({"trial_id": t, "step": step, "intermediate_value": stored, "intermediate_value_type": kind})
    _put(session, TrialIntermediateValueModel, reports)
    for model, attrs in (
        (TrialSystemAttributeModel, writes.system_attrs),
        (TrialUserAttributeModel, writes.user_attrs),
    ):
        rows = [
            {"trial_id": t, "key": key, "value_json": json.dumps(value)}
            for (t, key), value in attrs.items()
            if t in running
        ]
        _put(session, model, rows)
    ends = {t: end for t, end in writes.ends.items() if t in running}
    values = []
    for t, (_, told) in ends.items():
        for objective, value in enumerate(told or ()):
            number, finite = TrialValueModel.value_to_stored_repr(value)
            values.append({"trial_id": t, "objective": objective, "value": number, "value_type": finite})
    _put(session, TrialValueModel, values)
    if ends:
        table = TrialModel.__table__
        statement = sa.update(table).where(table.c.trial_id == sa.bindparam("t"))
        session.connection().execute(
            statement.values(state=sa.bindparam("s"), datetime_complete=_stored(now)),
            [{"t": t, "s": state} for t, (state, _) in ends.items()],
        )


def _put(session: Session, model: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert rows, or change those that have the same trial and name."""
    if not rows:
        return
    dialect = session.get_bind().dialect.name
    session.connection().execute(_put_statement(model.__table__, dialect, tuple(rows[0])), rows)


@functools.lru_cache(maxsize=100)
def _put_statement(table: sa.Table, dialect: str, columns: tuple[str, ...]) -> sa.Executable:
    kind = postgresql if dialect == "postgresql" else sqlite
    statement: postgresql.Insert | sqlite.Insert = kind.insert(table)
    (unique,) = (c for c in table.constraints if isinstance(c, sa.UniqueConstraint))
    names = [column.name for column in unique.columns]
    changed = {name: statement.excluded[name] for name in columns if name not in names}
    return statement.on_conflict_do_update(index_elements=names, set_=changed)


def _read(session: Session, ids: Sequence[int], key: Any, *columns: str) -> Iterator[Any]:
    """Rows of a table about trials, in the order in which they were written: id of the trial, and those columns."""
    model = key.class_
    for part in _parts(ids):
        wanted = sa.select(model.trial_id, *(getattr(model, name) for name in columns))
        yield from session.execute(wanted.where(model.trial_id.in_(part)).order_by(key))


def _parts(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(ids), _AT_ONCE):
        yield ids[first : first + _AT_ONCE]


@functools.lru_cache(maxsize=1000)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _stored(time: datetime.datetime) -> datetime.datetime:
    """As Optuna stores it: UTC, without saying so."""
    return time.astimezone(datetime.UTC).replace(tzinfo=None)


def _local(time: datetime.datetime | None) -> datetime.datetime | None:
    """As Optuna shows it: local time, without saying so."""
    return None if time is None else time.replace(tzinfo=datetime.UTC).astimezone().replace(tzinfo=None)
