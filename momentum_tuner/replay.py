"""A trial trained again, from its ticket alone, beside what was recorded of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import TensorDataset

from momentum_tuner.database import Database, plain_number
from momentum_tuner.errors import MomentumTunerError, StudyFailedError, TrialNotFoundError, describe_failure
from momentum_tuner.launcher import load_checked_task, own_trust
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.tasks import Loop, Task, describe_data
from momentum_tuner.tickets import StudyRecord, TrialRecord, read_epochs
from momentum_tuner.trainer import SlotState
from momentum_tuner.worker import describe_machine, study_trainer, trial_settings

TOLERANCE = 1e-3
MEASURES = ("train_loss", "valid_loss")
"""What is compared: the two curves. Counts and shares jump where a rounding tips them."""
MATTERS = ("device", "gpu", "cuda", "processor", "torch", "numpy", "momentum-tuner", "threads")
"""What of a worker's machine the numbers depend on."""


@dataclass(frozen=True)
class EpochPair:
    """One epoch, recorded and replayed.

    Attributes:
        epoch: which; 0 is the untrained model.
        recorded: the losses that the database has.
        replayed: those of now.
        difference: the larger of their relative differences; infinite where one of the two trials has no loss.
    """

    epoch: int
    recorded: Mapping[str, float | None]
    replayed: Mapping[str, float | None]
    difference: float


@dataclass(frozen=True)
class Replay:
    """What came of training a trial again.

    Attributes:
        study: the study's name.
        optimizer: whose trial it is.
        trial: its number in Optuna's study.
        kind: `search`, `reference` or `confirm`.
        seed: of initial weights and data order.
        settings: all hyperparameters.
        outcome: what became of the recorded trial.
        device: what it was trained on now.
        tolerance: the largest relative difference of a loss that rounding explains.
        epochs: all epochs, in order.
        verdict: `equal` to the last bit, `within tolerance` or `not equal`.
        largest: the largest relative difference of a loss.
        apart_from: the first epoch that is beyond the tolerance.
        reasons: what may explain a difference.
    """

    study: str
    optimizer: str
    trial: int
    kind: str
    seed: int
    settings: Mapping[str, Any]
    outcome: str | None
    device: str
    tolerance: float
    epochs: tuple[EpochPair, ...]
    verdict: Literal["equal", "within tolerance", "not equal"]
    largest: float
    apart_from: int | None
    reasons: tuple[str, ...]

    def flat(self) -> dict[str, Any]:
        """As plain JSON values."""
        found = asdict(self)
        found["settings"] = {name: plain_number(value) for name, value in self.settings.items()}
        found["largest"] = plain_number(self.largest)
        found["epochs"] = [{**pair, "difference": plain_number(pair["difference"])} for pair in found["epochs"]]
        return {**found, "reasons": list(self.reasons)}


def replay_trial(
    database: Database,
    study: StudyRecord,
    trial: TrialRecord,
    *,
    device: str = "cpu",
    trusted: Sequence[str] = (),
    tolerance: float = TOLERANCE,
    at_start: Callable[[Task | Loop], None] = lambda task: None,
    after_epoch: Callable[[int, int], None] = lambda epoch, last: None,
    at_end: Callable[[Task | Loop, SlotState], None] = lambda task, state: None,
) -> Replay:
    """Train a trial again as far as it was recorded, with the trainer alone: nothing is written.

    Args:
        database: where it was recorded.
        study: whose trial it is.
        trial: which.
        device: what to train on.
        trusted: what may be imported.
        tolerance: the largest relative difference of a loss that rounding explains.
        at_start: told of the task before it is trained.
        after_epoch: told of each epoch, and of the last one there will be.
        at_end: told of the task and of what the trial ended in, unless it diverged.

    Raises:
        TrialNotFoundError: nothing was recorded of it.
        TaskError: its task cannot be loaded.
        StudyFailedError: the task failed in training.
    """
    recorded = read_epochs(database, [trial.ticket_id])[trial.ticket_id]
    if not recorded:
        raise TrialNotFoundError(
            f"no epoch of trial {trial.number} of {trial.optimizer} was recorded; name another one"
        )
    task = load_checked_task(study.spec, Path(study.folder) if study.folder else None, trusted)
    at_start(task)
    replayed: list[EpochRecord] = []
    with _threads_of(trial, device):
        try:
            for record in _train(study, trial, task, device, len(recorded), at_end):
                replayed.append(record)
                after_epoch(record.epoch, recorded[-1].epoch)
        except MomentumTunerError:
            raise
        except Exception as error:
            reason = describe_failure(error)
            raise StudyFailedError(f"the trial fails in epoch {len(replayed)} now: {reason}") from error
        differ = tuple(_reasons(study, trial, task, device))
    epochs = tuple(_pairs(recorded, replayed))
    largest = max(pair.difference for pair in epochs)
    apart = [pair.epoch for pair in epochs if pair.difference > tolerance]
    verdict: Literal["equal", "within tolerance", "not equal"] = "not equal" if apart else "within tolerance"
    return Replay(
        study=study.name,
        optimizer=trial.optimizer,
        trial=trial.number,
        kind=trial.kind,
        seed=trial.seed,
        settings=trial.settings,
        outcome=trial.outcome,
        device=device,
        tolerance=tolerance,
        epochs=epochs,
        verdict=verdict if largest else "equal",
        largest=largest,
        apart_from=apart[0] if apart else None,
        reasons=differ if largest else (),
    )


@contextmanager
def _threads_of(trial: TrialRecord, device: str) -> Iterator[None]:
    """On a CPU, train with as many threads as were recorded: with others, sums are rounded in another order."""
    threads = (trial.environment or {}).get("threads")
    before = torch.get_num_threads()
    if device == "cpu" and isinstance(threads, int) and threads > 0:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train(
    study: StudyRecord,
    trial: TrialRecord,
    task: Task | Loop,
    device: str,
    count: int,
    at_end: Callable[[Task | Loop, SlotState], None],
) -> Iterator[EpochRecord]:
    """The trial's records anew, until it diverges or there are so many."""
    trainer = study_trainer(study.spec, task, slots=1, device=device)
    first = trainer.admit(trial.number, trial_settings(trial))
    assert first is not None
    yield first
    for _ in range(count - 1):
        for _, record in trainer.train_epoch():
            yield record
            if record.diverged_at_step is not None:
                return
    at_end(task, trainer.export(trial.number))


def _pairs(recorded: Sequence[EpochRecord], replayed: Sequence[EpochRecord]) -> Iterator[EpochPair]:
    """Each epoch of either. What is below the rounding of the untrained model's loss counts as nothing."""
    eps = torch.finfo(torch.float32).eps
    floor = eps * abs(recorded[0].valid_loss or 1.0)
    there, now = {r.epoch: r for r in recorded}, {r.epoch: r for r in replayed}
    for epoch in sorted(there | now):
        losses = [{name: getattr(of.get(epoch), name, None) for name in MEASURES} for of in (there, now)]
        apart = [_difference(losses[0][name], losses[1][name], floor) for name in MEASURES]
        if _ended(there.get(epoch)) != _ended(now.get(epoch)):
            apart.append(math.inf)
        yield EpochPair(epoch, losses[0], losses[1], max(apart))


def _ended(record: EpochRecord | None) -> bool | None:
    """Whether the trial diverged in this epoch; None for one that it did not come to."""
    return None if record is None else record.diverged_at_step is not None


def _difference(a: float | None, b: float | None, floor: float) -> float:
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b), floor)


def _reasons(study: StudyRecord, trial: TrialRecord, task: Task | Loop, device: str) -> Iterator[str]:
    """What may explain a difference, the likeliest first."""
    factory = study.spec.task.factory
    data = describe_data(task, factory, study.spec.task.params)
    if trial.data is not None and trial.data.get("digest") != data["digest"]:
        yield f"its data are others now: their digest was {trial.data.get('digest')} and is {data['digest']}"
    here = {"device": device, **describe_machine(device)}
    there = {"device": trial.device, **(trial.environment or {})}
    for name in MATTERS:
        if there.get(name) is not None and there[name] != here.get(name):
            yield f"{name}: {there[name]} when it was recorded, {here.get(name, 'none')} now"
    if isinstance(task, Loop):
        yield "its training loop is your own: what it draws at random beyond the context's seed differs"
    elif task.train is not None and not isinstance(task.train, TensorDataset):
        yield "its batches come from an iterable of your own, which may yield them in another order each time"
    if study.folder is not None and own_trust(study.spec, Path(study.folder)):
        yield f"the task is your own code: {factory} may have changed since"
    yield "it was trained beside other trials and now alone, which rounds sums in another order"
    yield "where a setting is near the edge of stability, rounding grows from epoch to epoch: see where the curves part"
