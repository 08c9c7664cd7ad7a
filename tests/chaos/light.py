"""Processes that train nothing: workers with nothing but their bookkeeping, and plain Optuna for comparison.

The nursery imports this file and runs `worker` or `plain` in a process of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import optuna

from momentum_tuner.launcher import process
from momentum_tuner.metrics import EpochRecord
from momentum_tuner.trainer import TrialSettings
from momentum_tuner.worker.pacing import Pacing


class LightTrainer:
    """Stands in for the trainer: an epoch of any number of slots is over at once."""

    whole_epochs = False
    failed: frozenset[Hashable] = frozenset()

    def __init__(self, slots: int) -> None:
        self.width = slots
        self._trials: dict[Hashable, tuple[float, int]] = {}  # the loss, and epochs done

    @property
    def keys(self) -> list[Hashable]:
        return list(self._trials)

    @property
    def free(self) -> int:
        return self.width - len(self._trials)

    def steps_per_epoch(self, batch_size: int) -> int:
        return 1

    def slot_number(self, key: Hashable) -> int:
        return self.keys.index(key)

    def admit(self, key: Hashable, settings: TrialSettings, state: None = None) -> EpochRecord:
        loss = settings.hyperparameters["learning_rate"]
        self._trials[key] = loss, 0
        return EpochRecord(epoch=0, step=0, valid_loss=2 * loss)

    def release(self, key: Hashable) -> None:
        del self._trials[key]

    def sharpness(self, keys: Sequence[Hashable], pause: Callable[[], bool]) -> dict[Hashable, None]:
        return dict.fromkeys(keys)

    def train_epoch(self, pause: Callable[[], bool]) -> Iterator[tuple[Hashable, EpochRecord]]:
        for key, (loss, done) in list(self._trials.items()):
            self._trials[key] = loss, done + 1
            yield key, EpochRecord(epoch=done + 1, step=done + 1, train_loss=loss, valid_loss=loss)


def worker() -> int:
    """The real worker, but for its trainer."""

    def make_trainer(self: Pacing, *_: Any) -> Any:
        assert self._options.slots is not None
        return LightTrainer(self._options.slots)

    Pacing.make_trainer = make_trainer  # type: ignore[method-assign]
    Pacing.consider_compiling = lambda *_: None  # type: ignore[method-assign]
    return process.main()


def plain() -> int:
    """Optuna's own ask and tell, once the file `go` is there."""
    order = json.loads(sys.stdin.readline())
    storage = optuna.storages.RDBStorage(order["storage"], skip_compatibility_check=True, skip_table_creation=True)
    found = optuna.load_study(
        study_name=order["study"], storage=storage, sampler=optuna.samplers.RandomSampler(order["seed"])
    )
    Path(order["ready"]).touch()
    while not Path(order["go"]).exists():
        time.sleep(0.01)
    for _ in range(order["trials"]):
        trial = found.ask()
        loss = trial.suggest_float("learning_rate", 1e-4, 1.0, log=True)
        trial.suggest_float("one_minus_momentum", 1e-3, 1.0, log=True)
        found.tell(trial, loss)
    return 0
