"""Optuna decides: which settings to try (sampler), which trials to stop (pruner). Nothing else of it is used.

Each contestant of a study has its own Optuna study `<study>/<contestant>` in the same database, so that Optuna's own
client and dashboard read it, and a second one for its confirmation, `<study>/<contestant>/confirm`.

Optuna prunes by the one value that a study is about. Where a study has two aims, or one that a running trial has no
value of, the reports of its trials are in a study of their own, `<study>/<contestant>/rungs`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from momentum_tuner.batch_tpe import BatchTPESampler, TPEMemory
from momentum_tuner.database import Database, engine_options, is_unreachable, refuse_other_optuna, tune_engine
from momentum_tuner.faults import crash_point
from momentum_tuner.halving import BatchHalvingPruner, BatchHyperbandPruner
from momentum_tuner.simplex import SimplexSampler
from momentum_tuner.space import distributions, grid, settings
from momentum_tuner.spec import StudySpec
from momentum_tuner.trial_cache import TrialCache

logger = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.WARNING)

TICKET = "ticket"
"""User attribute of every Optuna trial: the ticket it belongs to."""
REPORTS = "reports"
"""User attribute of a trial whose reports are in another study: the id of its trial there."""
DIVERGED = "diverged"
"""The constraint that a diverged trial is beyond, so that samplers keep away from there."""


class TrialLostError(Exception):
    """A trial was finished by another worker while this one was about to begin it."""


@dataclass(frozen=True)
class AskedTrial:
    """A trial as Optuna knows it, with all hyperparameters of its optimizer."""

    trial_id: int
    number: int
    settings: Mapping[str, Any]


class Search:
    """The Optuna studies of one study. A place is one of them: a contestant, or `<contestant>/confirm`.

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
        self._aims = [aim.direction for aim in spec.objective.aims]
        self._reports_apart = spec.objective.at_rungs is not spec.objective
        self._studies: dict[str, optuna.Study] = {}
        self._memories: dict[str, TPEMemory] = {}
        with self._reaching():
            self._backend = open_storage(database)
            self._storage = TrialCache(self._backend, database)
            for optimizer in spec.optimizers:
                self._study(optimizer)
        self._distributions = {optimizer: distributions(spec, optimizer) for optimizer in spec.contestants}

    @contextmanager
    def batch(self, fresh: bool = True) -> Iterator[None]:
        """For what is asked, reported, pruned and told meanwhile the trials of others are read once.

        It is written at the end, all or nothing; a trial that another worker has finished meanwhile is left as it is.

        Args:
            fresh: whether what others reported and told just now must be seen; otherwise within a short while.
        """
        with self._reaching(), self._storage.batch(fresh):
            yield

    def ask(self, place: str, ticket_id: int, fixed: Mapping[str, Any] | None = None) -> AskedTrial:
        """A new trial for a ticket; see `ask_all`.

        Raises:
            TrialLostError: another worker has adopted the ticket, and this trial was failed as a leftover meanwhile.
        """
        (asked,) = self.ask_all([(place, ticket_id, fixed)])
        return _not_lost(asked, ticket_id)

    def ask_all(self, wanted: Sequence[tuple[str, int, Mapping[str, Any] | None]]) -> list[AskedTrial | None]:
        """New trials for tickets. The sampler of a place looks at what was told once for all of them.

        Args:
            wanted: of each the place whose study is asked; its ticket, written on the trial as it is created, so that
                no trial is ever without its ticket; and Optuna parameters set in advance, of which the sampler is not
                asked.

        Returns:
            The trials, in order; None where another worker has adopted the ticket, and failed this trial as a leftover.
        """
        if not wanted:
            return []
        with self._in_batch():
            made = self._storage.create_trials(
                [
                    (self._study(place)._study_id, self._template(place, ticket, fixed))
                    for place, ticket, fixed in wanted
                ]
            )
            crash_point("asking")
            trial_ids: dict[str, list[int]] = {}
            for (place, _, _), trial in zip(wanted, made, strict=True):
                trial_ids.setdefault(place, []).append(trial._trial_id)
            suggested = self._suggest(trial_ids)
            return [suggested.get(trial._trial_id) for trial in made]

    def _template(self, place: str, ticket_id: int, fixed: Mapping[str, Any] | None) -> FrozenTrial:
        """A trial as it is created."""
        space, fixed = self._distributions[_contestant(place)], fixed or {}
        return optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(fixed),
            distributions={name: space[name] for name in fixed},
            user_attrs={TICKET: ticket_id},
        )

    def recall(self, place: str, ticket_id: int) -> AskedTrial | None:
        """The running trial that carries this ticket, if a worker asked for it and died before it noted it.

        Raises:
            TrialLostError: another worker has ended it just now.
        """
        with self._in_batch():
            for frozen in self._running(place):
                if frozen.user_attrs.get(TICKET) == ticket_id:
                    suggested = self._suggest({place: [frozen._trial_id]})
                    return _not_lost(suggested.get(frozen._trial_id), ticket_id)
        return None

    def fail_leftovers(self, read_noted: Callable[[], Mapping[int, tuple[int | None, bool]]]) -> int:
        """Fail the running trials that belong to no ticket any more; returns how many.

        A worker that was stopped for long before it asked gets a trial for a ticket that another worker has adopted.

        Args:
            read_noted: reads for each ticket the trial that is noted on it, and whether it is done; called when it is
                known which trials run, as a ticket is there before its trial.
        """
        with self._in_batch():
            running = [(place, frozen) for place in self._places() for frozen in self._running(place)]
            noted = read_noted() if running else {}
            left = []
            for place, frozen in running:
                trial_id, done = noted.get(frozen.user_attrs.get(TICKET, 0), (None, True))
                if done or trial_id not in (None, frozen._trial_id):
                    left.append((place, frozen._trial_id))
            for place, trial_id in left:
                self.tell(place, trial_id, "failed", None)
        return len(left)

    def report(self, place: str, trial_id: int, epoch: int, value: float) -> None:
        """Report the value at a rung of what the pruner judges.

        A report on a finished trial is passed over: its ticket was adopted, and who reports has not noticed yet.
        """
        with self._in_batch(), contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            self._storage.set_trial_intermediate_value(self._reporting(place, trial_id), epoch, value)

    def reported(self, place: str, trial_id: int) -> set[int]:
        """The epochs at which the trial has reported."""
        with self._in_batch():
            return set(self._storage.read_again(self._reporting(place, trial_id)).intermediate_values)

    def should_prune(self, place: str, trial_id: int) -> bool:
        """Whether the pruner stops the trial at its last report; not one that is finished."""
        with self._in_batch(), contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            study = self._study(self._reports_of(place))
            return bool(study.pruner.prune(study, self._storage.get_trial(self._reporting(place, trial_id))))
        return False

    def tell(
        self, place: str, trial_id: int, outcome: str, value: float | None, second_value: float | None = None
    ) -> None:
        """Finish a trial; telling it again changes nothing.

        A diverged trial is complete with the value of the untrained model, and beyond a constraint, so that the sampler
        learns from it. One that ended without a value is told as pruned: its parameters are not lost. A pruned one has
        the value that it reported last.
        """
        values = [value, second_value][: len(self._aims)]
        with self._in_batch():
            study = self._study(place)
            number = self._storage.get_trial_number_from_id(trial_id)
            if outcome == "failed":
                study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
            else:
                self._constrain(study, trial_id, outcome)
                told = [v for v in values if v is not None and math.isfinite(v)]
                if outcome == "pruned" or len(told) < len(values):
                    study.tell(number, state=TrialState.PRUNED, skip_if_finished=True)
                else:
                    study.tell(number, values=told, state=TrialState.COMPLETE, skip_if_finished=True)
            if self._reports_apart:
                self._end_reports(place, trial_id, outcome)

    @contextmanager
    def _in_batch(self) -> Iterator[None]:
        """The batch that this is in, which writes later, or one of its own."""
        if self._storage.batch_number is None:
            with self.batch():
                yield
        else:
            with self._reaching():
                yield

    def let_go(self, trial_ids: Iterable[int]) -> None:
        """Other workers go on with these trials: what they write of them is to be seen."""
        self._storage.let_go(trial_ids)

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
                if error.__cause__ is not None and is_unreachable(error.__cause__):
                    raise error.__cause__ from None
                raise

    def _places(self) -> list[str]:
        """The places of the study that have trials."""
        prefix = f"{self.spec.name}/"
        with self._reaching():
            names = [frozen.study_name for frozen in self._storage.get_all_studies()]
        places = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        return [place for place in places if not place.endswith(_RUNGS)]

    def _running(self, place: str) -> list[FrozenTrial]:
        return self._study(place).get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def _suggest(self, trial_ids: Mapping[str, Sequence[int]]) -> dict[int, AskedTrial]:
        """The settings of running trials, as far as the sampler does not set them; those ended elsewhere are left out.

        Args:
            trial_ids: by place, in the order of their numbers.
        """
        suggested: dict[int, AskedTrial] = {}
        for place, ids in trial_ids.items():
            optimizer = _contestant(place)
            # A study keeps the trials it has seen until its own next `ask` or `tell`: a new one sees what others told.
            # A new sampler, as one that starts again from the same seed would draw the points of its last life again.
            study = optuna.load_study(
                study_name=study_name(self.spec.name, place),
                storage=self._storage,
                sampler=optuna.samplers.RandomSampler(),
                pruner=self._study(place).pruner,
            )
            space = self._distributions[optimizer]
            memory = self._memories.setdefault(place, TPEMemory())
            sampler_of = make_samplers(self.spec, space, self._worker_seed, memory)
            for trial_id in ids:
                number = self._storage.get_trial_number_from_id(trial_id)
                study.sampler = sampler_of(number)
                with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
                    trial = optuna.Trial(study, trial_id)
                    drawn = {name: _suggest_one(trial, name, d) for name, d in space.items()}
                    suggested[trial_id] = AskedTrial(trial_id, number, settings(self.spec, optimizer, drawn))
        for trial_id in self._storage.flush():
            suggested.pop(trial_id, None)
        return suggested

    def _study(self, place: str) -> optuna.Study:
        """The Optuna study of a place, made if it is not there; nobody asks its sampler."""
        if place not in self._studies:
            rungs = place.endswith(_RUNGS)
            self._studies[place] = optuna.create_study(
                storage=self._storage,
                study_name=study_name(self.spec.name, place),
                directions=[self.spec.objective.at_rungs.direction] if rungs else self._aims,
                sampler=optuna.samplers.RandomSampler(),
                pruner=make_pruner(self.spec) if rungs == self._reports_apart else optuna.pruners.NopPruner(),
                load_if_exists=True,
            )
        return self._studies[place]

    def _constrain(self, study: optuna.Study, trial_id: int, outcome: str) -> None:
        """Set the constraint of a trial that has none; within it, a trial needs one only for the GP sampler."""
        beyond = outcome == "diverged"
        if not (beyond or self.spec.sampler.name == "gp"):
            return
        if self._storage.get_trial(trial_id).state is TrialState.RUNNING:
            trial = optuna.Trial(study, trial_id)
            with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):  # it was told just now
                if DIVERGED not in trial.constraints:
                    trial.set_constraint(DIVERGED, 1.0 if beyond else 0.0)

    def _reports_of(self, place: str) -> str:
        """The place where the reports of a place's trials are."""
        return place + _RUNGS if self._reports_apart else place

    def _reporting(self, place: str, trial_id: int) -> int:
        """The trial that a trial reports to, made if it is not there: itself, or its twin in the study of reports."""
        if not self._reports_apart:
            return trial_id
        known = self._storage.get_trial(trial_id).user_attrs
        if REPORTS in known:
            return int(known[REPORTS])
        study = self._study(self._reports_of(place))
        for frozen in study.get_trials(deepcopy=False):
            if frozen.user_attrs.get(TICKET) == known.get(TICKET):  # a worker made it, and died before it was noted
                twin = frozen._trial_id
                break
        else:
            template = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={TICKET: known.get(TICKET)})
            twin = self._storage.create_new_trial(study._study_id, template)
        self._storage.set_trial_user_attr(trial_id, REPORTS, twin)
        return twin

    def _end_reports(self, place: str, trial_id: int, outcome: str) -> None:
        """Finish the trial that reports, if there is one, so that Optuna's client shows none that runs for ever."""
        twin = self._storage.get_trial(trial_id).user_attrs.get(REPORTS)
        if twin is None:
            return
        state = TrialState.FAIL if outcome == "failed" else TrialState.PRUNED
        number = self._storage.get_trial_number_from_id(twin)
        self._study(self._reports_of(place)).tell(number, state=state, skip_if_finished=True)


_RUNGS = "/rungs"


def _not_lost(asked: AskedTrial | None, ticket_id: int) -> AskedTrial:
    if asked is None:
        raise TrialLostError(f"the trial of ticket {ticket_id} was ended by another worker")
    return asked


def _contestant(place: str) -> str:
    return place.split("/")[0]


def study_name(study: str, place: str) -> str:
    """The name of the Optuna study of a place."""
    return f"{study}/{place}"


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
    try:
        refuse_other_optuna(database, storage)
        tune_engine(storage.engine)
    finally:
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


def make_samplers(
    spec: StudySpec,
    space: Mapping[str, optuna.distributions.BaseDistribution],
    worker_seed: int,
    memory: TPEMemory | None = None,
) -> Callable[[int], optuna.samplers.BaseSampler]:
    """The samplers of a study file for the trials of a batch, by their numbers, in order.

    Each trial is drawn with a seed of its own; what the sampler made of the trials before is made once for the batch.
    Designs (grid, qmc) are drawn in advance and need none.

    Args:
        spec: the study.
        space: Optuna's parameters of the contestant.
        worker_seed: makes several workers draw different points.
        memory: of the samplers of the batches before.
    """
    broad = _broad_samplers(spec, space, memory)

    def sampler_of(number: int) -> optuna.samplers.BaseSampler:
        sampler = broad(int(np.random.SeedSequence((spec.seed, worker_seed, number)).generate_state(1)[0]))
        if spec.sampler.refine is None or number < (first := spec.budget.trials - spec.sampler.refine):
            return sampler
        return SimplexSampler(first, maximize=spec.objective.direction == "maximize", before=sampler)

    return sampler_of


def _broad_samplers(
    spec: StudySpec, space: Mapping[str, optuna.distributions.BaseDistribution], memory: TPEMemory | None
) -> Callable[[int], optuna.samplers.BaseSampler]:
    """The samplers of a batch by a trial's seed."""
    tpe = BatchTPESampler(space, memory)
    fitted: list[optuna.samplers.GPSampler] = []

    def gaussian_process(seed: int) -> optuna.samplers.BaseSampler:
        sampler = optuna.samplers.GPSampler(seed=seed)
        if fitted:  # the kernels of the trial before, of the same evidence, are where its fit begins
            last = fitted.pop()
            sampler._gprs_cache_list = last._gprs_cache_list
            sampler._constraints_gprs_cache_list = last._constraints_gprs_cache_list
        fitted.append(sampler)
        return sampler

    def evolution(seed: int) -> optuna.samplers.BaseSampler:
        # It searches no choices, and nothing in a space of one dimension: what is left goes to TPE.
        return optuna.samplers.CmaEsSampler(
            seed=seed, independent_sampler=tpe.seeded(seed), warn_independent_sampling=False
        )

    match spec.sampler.name:
        case "gp":
            return gaussian_process
        case "cmaes":
            return evolution
        case "tpe":
            return tpe.seeded
        case _:
            return lambda seed: optuna.samplers.RandomSampler(seed=seed)


def make_pruner(spec: StudySpec) -> optuna.pruners.BasePruner:
    """The pruner of a study file; it sees reports at the rungs of `StudySpec.rungs`."""
    pruner = spec.pruner
    match pruner.name:
        case "successive_halving":
            return BatchHalvingPruner(pruner.min_epochs, pruner.reduction_factor)
        case "hyperband":
            return BatchHyperbandPruner(pruner.min_epochs, spec.budget.epochs, pruner.reduction_factor)
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
