"""What a reader of a comparison must know to trust its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from momentum_tuner.comparison.confirmation import Confirmation
from momentum_tuner.comparison.pairs import Raced
from momentum_tuner.comparison.statistics import LEAST_FOR_P
from momentum_tuner.database import Database, Study, Ticket
from momentum_tuner.spec import BATCH_SIZE, StudySpec
from momentum_tuner.tickets import OTHER_DATA, StudyRecord

_FEW_MISSES = 0.1


@dataclass(frozen=True)
class Tally:
    """How far a study is.

    Attributes:
        phase: of the study, as the database has it now.
        searched: search trials that have ended, by contestant.
        failed: those of them that failed.
        data: the digests of what its workers found to train on, the first worker's first.
    """

    phase: str
    searched: Mapping[str, int]
    failed: Mapping[str, int]
    data: Sequence[str]


def tally(database: Database, study: StudyRecord) -> Tally:
    """Count a study's search trials."""
    searched = dict.fromkeys(study.spec.contestants, 0)
    failed = dict.fromkeys(study.spec.contestants, 0)
    with database.read() as session:
        found = session.execute(sa.select(Study.phase, Study.data).where(Study.id == study.id)).one_or_none()
        phase, data = (study.phase, None) if found is None else found
        rows = session.execute(
            sa.select(Ticket.optimizer, Ticket.outcome, sa.func.count())
            .where(
                Ticket.study_id == study.id,
                Ticket.kind.in_(("search", "reference")),
                Ticket.optimizer.in_(study.spec.contestants),
                Ticket.state == "done",
            )
            .group_by(Ticket.optimizer, Ticket.outcome)
        )
        for optimizer, outcome, count in rows:
            searched[optimizer] += count
            failed[optimizer] += count if outcome == "failed" else 0
    digests = (data["digest"], *data.get(OTHER_DATA, ())) if data else ()
    return Tally(phase, searched, failed, digests)


def notes_on(
    spec: StudySpec,
    counted: Tally,
    confirmed: Mapping[str, Confirmation],
    raced: Mapping[str, Raced],
    target: float | None,
) -> Iterator[str]:
    """The notes on a comparison, the gravest first.

    Args:
        spec: the study.
        counted: how far its search is.
        confirmed: the contestants that have a setting, and its confirmation.
        raced: those of them that have confirmation trials, against the target.
        target: the value to reach.
    """
    if len(counted.data) > 1:
        yield (
            f"not all trials learned from the same data (digests {', '.join(counted.data)}): "
            "begin a new study where all workers find the same"
        )
    yield from _on_the_search(spec, counted, confirmed)
    if not confirmed:
        return
    yield from _on_the_confirmation(spec, confirmed)
    if target is None and spec.confirm.seeds and any(c.trials for c in confirmed.values()):
        yield f"there is no target yet: it comes from the confirmation of {spec.reference}, which has no result"
    yield from _on_the_race(spec, raced)
    yield from _on_the_work(confirmed)


def _on_the_work(confirmed: Mapping[str, Confirmation]) -> Iterator[str]:
    sizes = {o: c.best.settings.get(BATCH_SIZE) for o, c in confirmed.items()}
    budgets = {o: c.best.measures["steps"] for o, c in confirmed.items()}
    in_epochs = "" if len(set(budgets.values())) == 1 else ", so speed is compared in epochs"
    if len(set(sizes.values())) > 1:
        yield f"a step is not the same work for all: their best batch sizes are {_listed(sizes)}{in_epochs}"
    elif in_epochs:
        yield f"a step is not the same work for all: their budgets are {_listed(budgets)} steps{in_epochs}"


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{value} ({optimizer})" for optimizer, value in values.items())


def _on_the_search(spec: StudySpec, counted: Tally, confirmed: Mapping[str, Confirmation]) -> Iterator[str]:
    whole = spec.budget.trials * len(spec.contestants)
    ended = sum(counted.searched.values())
    if ended < whole:
        yield f"the search is not over: {ended} of {whole} trials have ended"
    for optimizer in spec.contestants:
        if optimizer not in confirmed:
            yield f"{optimizer} has no completed trial, and is not compared"
        if counted.failed[optimizer]:
            yield f"{optimizer}: {counted.failed[optimizer]} of its {spec.budget.trials} search trials failed"


def _on_the_confirmation(spec: StudySpec, confirmed: Mapping[str, Confirmation]) -> Iterator[str]:
    seeds = spec.confirm.seeds
    if seeds == 0:
        yield "the study confirms nothing (confirm.seeds is 0), so there is no verdict"
        return
    whole = seeds * len(confirmed)
    ended = sum(len(c.trials) + c.failed for c in confirmed.values())
    if ended == 0:
        yield "no confirmation trial has ended yet, so there is no verdict yet"
    elif ended < whole:
        yield f"the confirmation is not over: {ended} of {whole} trials have ended"
    for optimizer, confirmation in confirmed.items():
        if confirmation.failed:
            yield f"{optimizer}: {confirmation.failed} of its {seeds} confirmation trials failed, and are left out"
    if seeds < LEAST_FOR_P:
        yield f"with fewer than {LEAST_FOR_P} seeds no p can be below 0.05"


def _on_the_race(spec: StudySpec, raced: Mapping[str, Raced]) -> Iterator[str]:
    if any(steps == 0.0 for r in raced.values() for steps in r.steps.values()):
        yield "the untrained model of some seed reaches the target already: it says nothing of speed"
    reference = raced.get(spec.reference or "")
    if spec.target == "auto" and reference is not None:
        yield f"the target is the median over seeds of the best that {reference.optimizer} reaches, and 5% beyond"
        missed = sum(steps is None for steps in reference.steps.values())
        if missed > _FEW_MISSES * len(reference.steps):
            yield (
                f"{reference.optimizer} itself misses the target in {missed} of {len(reference.steps)} seeds: what it "
                "reaches differs by more than the target's 5%"
            )
    for optimizer, r in raced.items():
        if r.alike(r.trials):
            yield f"{optimizer}: all seeds gave the same result, so they count as no more than one"
