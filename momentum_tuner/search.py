"""Optuna decides: which settings to try (sampler), which trials to stop (pruner). Nothing else of it is used.

Each optimizer of a study has its own Optuna study `<study>/<optimizer>` in the same database, so that Optuna's own
client and dashboard read it.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from momentum_tuner.database import UNREACHABLE, Database, engine_options, optuna_differs, tune_engine
from momentum_tuner.errors import StorageError
from momentum_tuner.faults import crash_point
from momentum_tuner.space import distributions, grid, settings
from momentum_tuner.spec import StudySpec

logger = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.WARNING)

TICKET = "ticket"
"""User attribute of every Optuna trial: the ticket it belongs to."""


@dataclass(frozen=True)
class AskedTrial:
    """A trial as Optuna knows it, with all hyperparameters of its optimizer."""

    trial_id: int
    number: int
    settings: Mapping[str, Any]


class Search:
    """The Optuna studies of one study, one for each optimizer.

    Every method raises `StorageError` where the database does not answer; each can be called again then.

    Args:
        database: where they live, beside our own tables; migrated.
        spec: the study.
        worker_seed: makes the samplers of several workers draw different points.
    """

    def __init__(self, database: Database, spec: StudySpec, worker_seed: int = 0) -> None:
        self.spec = spec
        self._database = database
        self._worker_seed = worker_seed
        with self._reaching():
            self._backend = open_storage(database)
            self._storage = optuna.storages.get_storage(self._backend)  # finished trials are kept in memory
            self._studies = {optimizer: self._open(optimizer) for optimizer in spec.optimizers}
        self._distributions = {optimizer: distributions(spec, optimizer) for optimizer in spec.optimizers}

    def ask(self, optimizer: str, ticket_id: int, fixed: Mapping[str, Any] | None = None) -> AskedTrial:
        """A new trial for a ticket.

        Args:
            optimizer: whose study is asked.
            ticket_id: written on the trial as it is created, so that no trial is ever without its ticket.
            fixed: Optuna parameters set in advance; the sampler is not asked.
        """
        space = self._distributions[optimizer]
        template = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(fixed or {}),
            distributions={name: space[name] for name in fixed or {}},
            user_attrs={TICKET: ticket_id},
        )
        with self._reaching():
            trial_id = self._storage.create_new_trial(self._study_id(optimizer), template)
            crash_point("asking")
            return self._suggest(optimizer, trial_id)

    def recall(self, optimizer: str, ticket_id: int) -> AskedTrial | None:
        """The running trial that carries this ticket, if a worker asked for it and died before it noted it."""
        with self._reaching():
            for frozen in self._running(optimizer):
                if frozen.user_attrs.get(TICKET) == ticket_id:
                    return self._suggest(optimizer, frozen._trial_id)
        return None

    def fail_leftovers(self, noted: Mapping[int, tuple[int | None, bool]]) -> int:
        """Fail the running trials that belong to no ticket any more; returns how many.

        A worker that was stopped for long before it asked gets a trial for a ticket that another worker has adopted.

        Args:
            noted: for each ticket the trial that is noted on it, and whether it is done.
        """
        left = 0
        for optimizer in self.spec.optimizers:
            with self._reaching():
                running = self._running(optimizer)
            for frozen in running:
                trial_id, done = noted.get(frozen.user_attrs.get(TICKET, 0), (None, True))
                if done or trial_id not in (None, frozen._trial_id):
                    self.tell(optimizer, frozen._trial_id, "failed", None)
                    left += 1
        return left

    def report(self, optimizer: str, trial_id: int, epoch: int, value: float) -> None:
        """Report the objective's value at a rung."""
        with self._reaching():
            self._storage.set_trial_intermediate_value(trial_id, epoch, value)

    def reported(self, trial_id: int) -> set[int]:
        """The epochs at which the trial has reported."""
        with self._reaching():
            return set(self._storage.get_trial(trial_id).intermediate_values)

    def should_prune(self, optimizer: str, trial_id: int) -> bool:
        """Whether the pruner stops the trial at its last report."""
        study = self._studies[optimizer]
        with self._reaching():
            return bool(study.pruner.prune(study, self._storage.get_trial(trial_id)))

    def tell(self, optimizer: str, trial_id: int, outcome: str, value: float | None) -> None:
        """Finish a trial; telling it again changes nothing.

        A diverged trial is complete with the value of the untrained model, so that the sampler learns from it. A
        pruned one has the value that it reported last.
        """
        values = None
        if outcome == "pruned":
            state = TrialState.PRUNED
        elif outcome == "failed" or value is None or not math.isfinite(value):
            state = TrialState.FAIL
        else:
            state, values = TrialState.COMPLETE, value
        with self._reaching():
            number = self._storage.get_trial_number_from_id(trial_id)
            self._studies[optimizer].tell(number, values=values, state=state, skip_if_finished=True)

    def close(self) -> None:
        """Give the connections back."""
        self._backend.remove_session()
        self._backend.engine.dispose()

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Turn errors of reaching the database into `StorageError`, those that Optuna wraps too."""
        with self._database.translated():
            try:
                yield
            except optuna.exceptions.StorageInternalError as error:
                if isinstance(error.__cause__, UNREACHABLE):
                    raise error.__cause__ from None
                raise

    def _study_id(self, optimizer: str) -> int:
        return self._storage.get_study_id_from_name(study_name(self.spec.name, optimizer))

    def _running(self, optimizer: str) -> list[optuna.trial.FrozenTrial]:
        return self._studies[optimizer].get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _suggest(self, optimizer: str, trial_id: int) -> AskedTrial:
        number = self._storage.get_trial_number_from_id(trial_id)
        # A study keeps the trials it has seen until its own next `ask` or `tell`: a new one sees what others told.
        # A new sampler, as one that starts again from the same seed would draw the points of its last life again.
        study = optuna.load_study(
            study_name=study_name(self.spec.name, optimizer),
            storage=self._storage,
            sampler=make_sampler(self.spec, self._worker_seed, number),
            pruner=self._studies[optimizer].pruner,
        )
        trial = optuna.Trial(study, trial_id)
        params = {
            name: _suggest_one(trial, name, distribution)
            for name, distribution in self._distributions[optimizer].items()
        }
        return AskedTrial(trial_id, number, settings(self.spec, optimizer, params))

    def _open(self, optimizer: str) -> optuna.Study:
        return optuna.create_study(
            storage=self._storage,
            study_name=study_name(self.spec.name, optimizer),
            direction=self.spec.objective.direction,
            pruner=make_pruner(self.spec),
            load_if_exists=True,
        )


def study_name(study: str, optimizer: str) -> str:
    """The name of an optimizer's Optuna study."""
    return f"{study}/{optimizer}"


def open_storage(database: Database) -> optuna.storages.RDBStorage:
    """Optuna's storage on the same database, with our timeouts.

    Raises:
        StorageError: Optuna's tables there are of another version of Optuna.
    """
    storage = optuna.storages.RDBStorage(
        database.text,
        engine_kwargs=engine_options(database.url, 2),  # Optuna opens a second connection to look at its version
        skip_table_creation=True,
        skip_compatibility_check=True,
    )
    held, known = storage.get_current_version(), storage.get_head_version()
    if held != known:
        storage.remove_session()
        storage.engine.dispose()
        raise StorageError(optuna_differs(database, held, known))
    tune_engine(storage.engine)
    storage.remove_session()
    storage.engine.dispose()  # connections from before the tuning
    return storage


def check_optuna(database: Database) -> None:
    """See that Optuna's tables are of the version of the Optuna of this machine.

    Raises:
        StorageError: they are not, or the database does not answer.
    """
    with database.translated():
        open_storage(database).engine.dispose()


def make_sampler(spec: StudySpec, worker_seed: int, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of a study file for one trial. Designs (grid, qmc) are drawn in advance and need none.

    Args:
        spec: the study.
        worker_seed: makes several workers draw different points.
        number: the trial's number; each is drawn with a seed of its own.
    """
    seed = int(np.random.SeedSequence((spec.seed, worker_seed, number)).generate_state(1)[0])
    match spec.sampler.name:
        case "gp":
            return optuna.samplers.GPSampler(seed=seed)
        case "cmaes":
            # It searches no choices, and nothing in a space of one dimension: what is left goes to TPE.
            independent = optuna.samplers.TPESampler(seed=seed)
            return optuna.samplers.CmaEsSampler(
                seed=seed, independent_sampler=independent, warn_independent_sampling=False
            )
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        case _:
            return optuna.samplers.RandomSampler(seed=seed)


def make_pruner(spec: StudySpec) -> optuna.pruners.BasePruner:
    """The pruner of a study file; it sees reports at the rungs of `StudySpec.rungs`."""
    pruner = spec.pruner
    match pruner.name:
        case "successive_halving":
            return optuna.pruners.SuccessiveHalvingPruner(pruner.min_epochs, pruner.reduction_factor)
        case "hyperband":
            return optuna.pruners.HyperbandPruner(pruner.min_epochs, spec.budget.epochs, pruner.reduction_factor)
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=0)
        case _:
            return optuna.pruners.NopPruner()


def design(spec: StudySpec, optimizer: str) -> Sequence[Mapping[str, Any]] | None:
    """Optuna parameters of all trials, in order, where they do not depend on results; None to ask the sampler.

    A grid's or a low-discrepancy sequence's points belong to tickets, so that they are drawn once whatever the
    number of workers and whoever dies.
    """
    space = distributions(spec, optimizer)
    if not space:
        return [{} for _ in range(spec.budget.trials)]
    if spec.sampler.name == "grid":
        return grid(spec, optimizer)
    if spec.sampler.name != "qmc":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.QMCSampler(seed=spec.seed, scramble=True, warn_independent_sampling=False)
    study = optuna.create_study(sampler=sampler)  # counts the points drawn
    trial = optuna.trial.create_trial(state=TrialState.RUNNING)
    return [sampler.sample_relative(study, trial, space) for _ in range(spec.budget.trials)]


def delete_optuna_studies(database: Database, spec: StudySpec) -> None:
    """Remove the study's Optuna studies, those of its confirmation too."""
    storage = open_storage(database)
    for frozen in storage.get_all_studies():
        if frozen.study_name.startswith(f"{spec.name}/"):
            storage.delete_study(frozen._study_id)
    storage.remove_session()
    storage.engine.dispose()


def _suggest_one(trial: optuna.Trial, name: str, distribution: optuna.distributions.BaseDistribution) -> Any:
    match distribution:
        case optuna.distributions.FloatDistribution():
            return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)
        case optuna.distributions.IntDistribution():
            return trial.suggest_int(name, distribution.low, distribution.high, log=distribution.log)
        case optuna.distributions.CategoricalDistribution():
            return trial.suggest_categorical(name, distribution.choices)
    raise TypeError(f"unknown distribution {distribution!r}")
