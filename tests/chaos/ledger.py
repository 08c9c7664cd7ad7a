"""The ledger: what happened to each ticket and each record, written by the database itself, and what must hold of it.

Triggers that the test makes write it, so that it does not depend on the code under test. They see every claim, every
accepted result, and every record that a worker brings, those too that are there already. On PostgreSQL they see who
writes: the name of the connection, which the test gives to each process.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import optuna
import sqlalchemy as sa
from optuna.trial import TrialState

from momentum_tuner.database import Database
from momentum_tuner.spec import StudySpec

from .traces import newest_file

_TABLE = """
CREATE TABLE ledger (
    id {serial}, at double precision NOT NULL, begun double precision NOT NULL, writer text, what text NOT NULL,
    ticket_id bigint, worker_id text, generation integer, state text, old_worker_id text, old_generation integer,
    old_state text, attempts integer, outcome text, value double precision, checkpoint text, epoch integer
)"""
_COLUMNS = (
    "at, begun, writer, what, ticket_id, worker_id, generation, state, old_worker_id, old_generation, old_state, "
    "attempts, outcome, value, checkpoint, epoch"
)
_TICKET = "NEW.id, NEW.worker_id, NEW.generation, NEW.state, OLD.worker_id, OLD.generation, OLD.state, "
_ROWS = {
    # For each trigger: when it fires, and what it writes after `at, begun, writer`.
    "ticket": ("AFTER UPDATE ON tickets", f"{_TICKET} NEW.attempts, NEW.outcome, NEW.value, NEW.checkpoint, NULL"),
    "brought": (
        "BEFORE INSERT ON epochs",
        "NEW.ticket_id, (SELECT worker_id FROM tickets WHERE id = NEW.ticket_id), "
        "(SELECT generation FROM tickets WHERE id = NEW.ticket_id), "
        "(SELECT state FROM tickets WHERE id = NEW.ticket_id), "
        "NULL, NULL, NULL, NULL, NULL, NULL, NULL, NEW.epoch",
    ),
    "recorded": (
        "AFTER INSERT ON epochs",
        "NEW.ticket_id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NEW.epoch",
    ),
    "changed": (
        "AFTER UPDATE ON epochs",
        "NEW.ticket_id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NEW.epoch",
    ),
    "removed": (
        "AFTER DELETE ON epochs",
        "OLD.ticket_id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, OLD.epoch",
    ),
    "deleted": (
        "AFTER DELETE ON tickets",
        "OLD.id, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL",
    ),
    "born": (
        "AFTER INSERT ON workers",
        "NULL, NEW.id, NULL, NEW.state, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL",
    ),
    "beat": (
        "AFTER UPDATE ON workers",
        "NULL, NEW.id, NULL, NEW.state, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL",
    ),
}
_NOW = {
    "postgresql": "extract(epoch FROM clock_timestamp()), extract(epoch FROM now()), "
    "current_setting('application_name')",
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0, (julianday('now') - 2440587.5) * 86400.0, NULL",
}

ALLOWED = {
    ("open", "running"),  # claimed
    ("open", "finishing"),  # claimed with all attempts used up
    ("running", "running"),  # adopted, or its trial or checkpoint noted
    ("running", "open"),  # given back
    ("running", "finishing"),  # it has a result
    ("finishing", "finishing"),  # adopted with its result
    ("finishing", "done"),
}
TOLD = {
    "complete": {TrialState.COMPLETE, TrialState.PRUNED},
    "diverged": {TrialState.COMPLETE, TrialState.PRUNED},
    "pruned": {TrialState.PRUNED},
    "failed": {TrialState.FAIL},
}
"""What Optuna may be told for an outcome; PRUNED too where there is no value."""


@dataclass(frozen=True)
class Entry:
    """A line of the ledger. `begun` is when the transaction began, `at` when the line was written."""

    id: int
    at: float
    begun: float
    writer: str | None
    what: str
    ticket_id: int
    worker_id: str | None
    generation: int
    state: str
    old_worker_id: str | None
    old_generation: int
    old_state: str
    attempts: int
    outcome: str | None
    value: float | None
    checkpoint: str | None
    epoch: int

    @property
    def is_claim(self) -> bool:
        return self.what == "ticket" and self.generation != self.old_generation

    @property
    def is_adoption(self) -> bool:
        """Whether another worker held the ticket."""
        return self.is_claim and self.old_state != "open"


@dataclass
class Ledger:
    """The lines so far, and what people count in them."""

    entries: list[Entry] = field(default_factory=list)

    @cached_property
    def by_ticket(self) -> dict[int, list[Entry]]:
        """The changes of each ticket in their order."""
        found: dict[int, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            if entry.what == "ticket":
                found[entry.ticket_id].append(entry)
        return found

    @cached_property
    def brought(self) -> dict[tuple[int, int], list[Entry]]:
        """The records brought for a ticket under a generation, in their order."""
        found: dict[tuple[int, int], list[Entry]] = defaultdict(list)
        for entry in self.entries:
            if entry.what == "brought":
                found[entry.ticket_id, entry.generation].append(entry)
        return found

    @cached_property
    def claims(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.is_claim]

    @cached_property
    def adoptions(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.is_adoption]

    def adopted_from_living(self, killed: Mapping[str, float]) -> list[Entry]:
        """Adoptions from workers that were silent but not dead, given when each that was killed was."""
        return [a for a in self.adoptions if a.at < killed.get(a.old_worker_id or "", math.inf)]

    @cached_property
    def results(self) -> list[Entry]:
        """Accepted results: a ticket gets its outcome."""
        return [e for e in self.entries if e.what == "ticket" and e.state == "finishing" and e.old_state != "finishing"]

    @cached_property
    def workers(self) -> dict[str, str]:
        """The id of the worker that each process was, where the database says who writes."""
        return {e.writer: e.worker_id for e in self.entries if e.what == "born" and e.writer and e.worker_id}

    @cached_property
    def beats(self) -> dict[str, list[Entry]]:
        """For each worker when it was heard of."""
        found: dict[str, list[Entry]] = defaultdict(list)
        for entry in self.entries:
            if entry.what in ("born", "beat") and entry.worker_id:
                found[entry.worker_id].append(entry)
        return found


def open_ledger(database: Database) -> None:
    """Make the ledger's table and triggers."""
    serial = "bigserial PRIMARY KEY" if database.dialect == "postgresql" else "INTEGER PRIMARY KEY AUTOINCREMENT"
    with database.engine.begin() as connection:
        connection.exec_driver_sql(_TABLE.format(serial=serial))
        for name, (when, row) in _ROWS.items():
            values = f"{_NOW[database.dialect]}, '{name}', {row}"
            body = f"INSERT INTO ledger ({_COLUMNS}) SELECT {values};"
            trigger = f"CREATE TRIGGER ledger_{name} {when} FOR EACH ROW"
            if database.dialect == "sqlite":
                connection.exec_driver_sql(f"{trigger} BEGIN {body} END")
                continue
            result = "OLD" if "DELETE" in when else "NEW"
            connection.exec_driver_sql(
                f"CREATE FUNCTION ledger_{name}() RETURNS trigger LANGUAGE plpgsql AS "
                f"$$ BEGIN {body} RETURN {result}; END $$"
            )
            connection.exec_driver_sql(f"{trigger} EXECUTE FUNCTION ledger_{name}()")


def read_ledger(database: Database) -> Ledger:
    """All lines so far."""
    with database.engine.connect() as connection:
        rows = connection.exec_driver_sql(f"SELECT id, {_COLUMNS} FROM ledger ORDER BY id").all()
    return Ledger([Entry(*row) for row in rows])


def check_ledger(database: Database, spec: StudySpec, grace_seconds: float, killed: Mapping[str, float]) -> Ledger:
    """See that a study that is done lost nothing, did nothing twice, and kept its budget.

    Args:
        database: the study's, with nothing else in it.
        spec: the study.
        grace_seconds: after how long its workers give a silent one up.
        killed: when each worker that was killed was, by its id.

    Returns:
        the ledger.
    """
    ledger = read_ledger(database)
    with database.engine.connect() as connection:
        tickets = connection.execute(sa.text("SELECT * FROM tickets ORDER BY queue_order")).mappings().all()
        epochs = connection.execute(sa.text("SELECT ticket_id, epoch FROM epochs ORDER BY epoch")).all()
        phase = connection.execute(sa.text("SELECT phase FROM tuner_studies")).scalar_one()
    assert phase == "done"
    # The budget: exactly as many tickets of each contestant, and each of them done.
    positions = Counter((t["optimizer"], t["kind"], t["position"]) for t in tickets)
    budget = Counter(
        (o, "search" if o in spec.optimizers else "reference", p)
        for o in spec.contestants
        for p in range(spec.budget.trials)
    )
    assert positions == budget + Counter((o, "confirm", p) for o in spec.contestants for p in range(spec.confirm.seeds))
    assert {t["state"] for t in tickets} == {"done"}
    _check_changes(ledger, tickets)
    _check_claims(ledger, grace_seconds)
    _check_writers(ledger)
    _check_epochs(ledger, tickets, epochs)
    _check_optuna(database, spec, tickets, len(ledger.adopted_from_living(killed)))
    return ledger


def check_continuation(ledger: Ledger, adoptions: Sequence[Entry], positions: Mapping[str, Mapping[int, int]]) -> None:
    """See that trials went on from the newest checkpoint that their tickets knew, or from the start if they knew none.

    Args:
        ledger: of the study.
        adoptions: of the tickets to look at.
        positions: the epochs that each ticket has behind it in a file of checkpoints.
    """
    for adoption in adoptions:
        brought = [e.epoch for e in ledger.brought[adoption.ticket_id, adoption.generation]]
        file = newest_file(adoption.checkpoint)
        if adoption.old_state == "finishing":
            assert brought == [], adoption
        elif file is None or file in positions:
            start = 0 if file is None else positions[file][adoption.ticket_id] + 1
            assert brought == list(range(start, start + len(brought))), (adoption, start)


def _check_changes(ledger: Ledger, tickets: Sequence[sa.RowMapping]) -> None:
    """Each ticket went its way to `done` once, with one result, which is what the database holds."""
    results, done = Counter(e.ticket_id for e in ledger.results), Counter()
    for entry in ledger.entries:
        assert entry.what not in ("changed", "removed", "deleted"), entry
        if entry.what == "ticket":
            assert (entry.old_state, entry.state) in ALLOWED, entry
            assert entry.generation - entry.old_generation in (0, 1), entry
            done[entry.ticket_id] += entry.state == "done"
    assert set(ledger.by_ticket) == {t["id"] for t in tickets}
    for ticket in tickets:
        assert done[ticket["id"]] == results[ticket["id"]] == 1, ledger.by_ticket[ticket["id"]]
        accepted = [e for e in ledger.by_ticket[ticket["id"]] if e.state in ("finishing", "done")]
        assert {(e.outcome, e.value) for e in accepted} == {(ticket["outcome"], ticket["value"])}
        assert ticket["checkpoint"] is None


def _check_claims(ledger: Ledger, grace_seconds: float) -> None:
    """Nobody was given a ticket whose holder had been heard of within the grace and had not ended.

    A heartbeat that was on its way when the claim began does not count: half a second is more than enough for that.
    """
    for entry in ledger.claims:
        assert entry.worker_id is not None
        assert entry.generation == entry.old_generation + 1, entry
        if entry.is_adoption:
            assert entry.old_worker_id not in (None, entry.worker_id), entry
            heard = [beat for beat in ledger.beats[entry.old_worker_id] if beat.at < entry.begun - 0.5]
            silent = entry.at - heard[-1].at if heard else grace_seconds
            ended = any(b.state == "stopped" and b.id < entry.id for b in ledger.beats[entry.old_worker_id])
            assert ended or silent >= grace_seconds, (silent, entry)


def _check_writers(ledger: Ledger) -> None:
    """Whoever wrote to a ticket or a record held the ticket, where the database says who writes."""
    for entry in ledger.entries:
        if entry.what not in ("ticket", "brought") or entry.writer is None:
            continue
        holder = entry.worker_id if entry.is_claim or entry.what == "brought" else entry.old_worker_id
        assert ledger.workers.get(entry.writer) == holder, entry
        if entry.what == "brought":
            assert entry.state == "running", entry


def _check_epochs(ledger: Ledger, tickets: Sequence[sa.RowMapping], epochs: Sequence[sa.Row]) -> None:
    """Each trial has the records 0, 1, 2, ... up to its end, each written once."""
    recorded = Counter((e.ticket_id, e.epoch) for e in ledger.entries if e.what == "recorded")
    assert recorded == Counter((row[0], row[1]) for row in epochs)
    assert not recorded or max(recorded.values()) == 1
    held: dict[int, list[int]] = defaultdict(list)
    for ticket_id, epoch in epochs:
        held[ticket_id].append(epoch)
    for ticket in tickets:
        assert held[ticket["id"]] == list(range(len(held[ticket["id"]]))), ticket
        if ticket["outcome"] != "failed":
            assert json.loads(ticket["measures"]) if isinstance(ticket["measures"], str) else ticket["measures"]


def _check_optuna(database: Database, spec: StudySpec, tickets: Sequence[sa.RowMapping], lost_while_alive: int) -> None:
    """Optuna has the trials 0, 1, ..., n - 1 of each optimizer, one for each ticket, all told what the ticket says.

    A worker that lost a ticket while it lived may have asked for it afterwards: such a trial is failed, and there are
    no more of them than such tickets.
    """
    storage = optuna.storages.RDBStorage(database.text)
    extra = 0
    places = {(t["optimizer"], t["kind"] == "confirm") for t in tickets}
    for optimizer, confirmed in places:
        name = f"{spec.name}/{optimizer}/confirm" if confirmed else f"{spec.name}/{optimizer}"
        trials = optuna.load_study(study_name=name, storage=storage).trials
        these = [t for t in tickets if t["optimizer"] == optimizer and (t["kind"] == "confirm") == confirmed]
        mine = {t["trial_number"]: t for t in these}
        assert len(mine) == len(these)
        assert [t.number for t in trials] == list(range(len(trials)))
        extra += len(trials) - len(mine)
        for trial in trials:
            ticket = mine.get(trial.number)
            if ticket is None:
                assert trial.state is TrialState.FAIL, trial
                continue
            assert (trial._trial_id, trial.user_attrs) == (ticket["trial_id"], {"ticket": ticket["id"]})
            assert trial.state in TOLD[ticket["outcome"]], (trial, ticket)
            if trial.state is TrialState.COMPLETE:
                assert trial.value == ticket["value"]
            if trial.state is TrialState.PRUNED and ticket["outcome"] != "pruned":
                assert ticket["value"] is None, (trial, ticket)
    storage.remove_session()
    storage.engine.dispose()
    assert extra <= lost_while_alive
