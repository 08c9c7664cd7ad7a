"""A worker: claim, admit, train, record, report, prune, refill, until nothing is left or it is asked to stop."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from momentum_tuner.database import Database
from momentum_tuner.errors import MomentumTunerError, StudyFailedError, TaskError, describe_failure
from momentum_tuner.metrics import EpochRecord, TrialMeasures, objective_value, trial_measures
from momentum_tuner.search import Search
from momentum_tuner.spec import StudySpec
from momentum_tuner.tasks import Task, check_objective, check_task, load_task
from momentum_tuner.tickets import (
    Claim,
    Heartbeat,
    Result,
    StudyRecord,
    WorkerIdentity,
    assign_worker,
    begin_finish,
    claim,
    end_finish,
    find_study,
    finish_study,
    give_back,
    list_studies,
    noted_trials,
    record_epochs,
    register_worker,
    set_trials,
    stop_worker,
    with_trial,
)
from momentum_tuner.trainer import ScheduleSettings, Trainer, TrialSettings
from momentum_tuner.worker_options import WorkerOptions

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0


class StopSignal:
    """Turns the first SIGTERM or SIGINT into a wish to drain; the second ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def install(self) -> None:
        """Take over both signals of this process."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            os._exit(130)
        self.asked = True


@dataclass
class _Running:
    """A trial in a slot: its ticket and the records so far."""

    claim: Claim
    records: list[EpochRecord]


class Worker:
    """Serves open studies one after the other, oldest first.

    Args:
        database: studies and tickets.
        options: what to serve, and how.
        stop: the wish to drain.
    """

    def __init__(self, database: Database, options: WorkerOptions, stop: StopSignal | None = None) -> None:
        self.database = database
        self.options = options
        self.stop = stop or StopSignal()
        self.identity = WorkerIdentity.of_this_process()

    def run(self) -> None:
        """Work until every study to serve is done, or the wish to drain comes.

        Raises:
            InputError: a named study's task cannot be loaded.
        """
        register_worker(self.database, self.identity, self.options.device, self.options.node)
        refused: dict[int, str] = {}
        try:
            with Heartbeat(self.database, self.identity.id):
                while not self.stop.asked:
                    study = self._next_study(refused)
                    if study is not None:
                        self._serve(study, refused)
                    elif self._finished(refused):
                        break
                    else:
                        time.sleep(POLL_SECONDS)
        finally:
            stop_worker(self.database, self.identity.id)

    def _next_study(self, refused: Mapping[int, str]) -> StudyRecord | None:
        names = self.options.studies
        studies = [find_study(self.database, name) for name in names] if names else list_studies(self.database)
        return next((s for s in studies if s.phase != "done" and s.id not in refused), None)

    def _finished(self, refused: Mapping[int, str]) -> bool:
        """Whether to end where there is no study to serve."""
        if self.options.studies and refused:
            raise StudyFailedError("; ".join(refused.values()))
        return not self.options.forever

    def _serve(self, study: StudyRecord, refused: dict[int, str]) -> None:
        try:
            task = self._load(study)
        except TaskError as error:
            if self.options.studies:
                raise
            refused[study.id] = str(error)
            logger.warning("study %s is not served: %s", study.name, error)
            return
        StudyWorker(self.database, self.identity.id, study, task, self.options, self.stop).run()

    def _load(self, study: StudyRecord) -> Task:
        folder = Path(study.folder) if study.folder else None
        task = load_task(study.spec.task.factory, study.spec.task.params, base=folder, trusted=self.options.trust)
        check_task(task)
        return task


class StudyWorker:
    """One worker on one study.

    Args:
        database: studies and tickets.
        worker_id: who holds the tickets.
        study: the study to serve.
        task: its task, loaded.
        options: device, slots, grace.
        stop: the wish to drain.
    """

    def __init__(
        self,
        database: Database,
        worker_id: str,
        study: StudyRecord,
        task: Task,
        options: WorkerOptions,
        stop: StopSignal,
    ) -> None:
        self.database = database
        self.worker_id = worker_id
        self.study = study
        self.spec: StudySpec = study.spec
        self.options = options
        self.stop = stop
        self.rungs = frozenset(self.spec.rungs())
        self.maximize = self.spec.objective.direction == "maximize"
        check_objective(self.spec.objective.metric, task)
        schedule = self.spec.schedule
        self.trainer = Trainer(
            task,
            epochs=self.spec.budget.epochs,
            slots=options.slots,
            device=options.device,
            precision=self.spec.precision,
            schedule=ScheduleSettings(schedule.name, schedule.options, schedule.warmup_epochs, schedule.warmup_start),
        )
        if options.slots is None:
            self.trainer.width = max(1, self.trainer.width // options.sharing)
        self.search = Search(database, self.spec, options.ordinal)
        self.running: dict[int, _Running] = {}

    def run(self) -> None:
        """Train until no ticket is left to claim, then see whether the study is done."""
        assign_worker(self.database, self.worker_id, self.study.id, self.trainer.width)
        try:
            while not self.stop.asked:
                self._refill()
                if self.running:
                    self._train_epoch()
                elif finish_study(self.database, self.study.id):
                    self.search.fail_leftovers(noted_trials(self.database, self.study.id))
                    return
                else:
                    time.sleep(POLL_SECONDS)  # others hold the last tickets; one of them may die
        finally:
            give_back(self.database, [r.claim for r in self.running.values()])
            assign_worker(self.database, self.worker_id, None, 0)
            self.search.close()

    def _refill(self) -> None:
        """Claim tickets for the free slots, ask Optuna for their settings, and admit them."""
        claims = claim(
            self.database,
            self.study.id,
            self.worker_id,
            self.trainer.free,
            max_attempts=self.spec.max_attempts,
            grace_seconds=self.options.grace_seconds,
        )
        decided = [c for c in claims if c.outcome is not None]
        for held in decided:
            self._tell(held, held.outcome or "failed", held.value)
        if decided:
            end_finish(self.database, decided)
        asked = [self._ask(c) for c in claims if c.outcome is None]
        first: list[tuple[Claim, EpochRecord]] = []
        slots: list[int] = []
        for held in asked:
            record = self.trainer.admit(held.ticket_id, trial_settings(held))
            assert record is not None
            self.running[held.ticket_id] = _Running(held, [record])
            first.append((held, record))
            slots.append(self.trainer.slot_number(held.ticket_id))
        if asked:
            set_trials(self.database, asked, slots)
            self._drop_lost([c for c, _ in first], record_epochs(self.database, first))

    def _ask(self, held: Claim) -> Claim:
        """The claim with its Optuna trial: its own, one that was asked for but never noted, or a new one."""
        if held.trial_id is not None and held.settings is not None:
            return held
        asked = self.search.recall(held.optimizer, held.ticket_id) if held.generation > 1 else None
        if asked is None:
            asked = self.search.ask(held.optimizer, held.ticket_id, held.fixed)
        return with_trial(held, asked.trial_id, asked.number, asked.settings)

    def _train_epoch(self) -> None:
        """One epoch of every slot: record, report at rungs, and let go of what has ended."""
        records: list[tuple[Claim, EpochRecord]] = []
        failure: str | None = None
        try:
            for key, record in self.trainer.train_epoch():
                assert isinstance(key, int)
                running = self.running[key]
                running.records.append(record)
                records.append((running.claim, record))
        except MomentumTunerError:
            raise
        except Exception as error:
            failure = describe_failure(error)
            logger.error("an epoch failed: %s", failure)
        if failure is not None:
            trained = {c.ticket_id for c, _ in records}
            lost = [r for key, r in self.running.items() if key not in trained]
            self._finish([(r.claim, Result("failed", reason=failure)) for r in lost])
        held = record_epochs(self.database, records)
        self._drop_lost([c for c, _ in records], held)
        alive = [self.running[c.ticket_id] for c, _ in records if c.ticket_id in held]
        self._finish(self._decide(alive))

    def _decide(self, alive: Sequence[_Running]) -> list[tuple[Claim, Result]]:
        """Results of the trials that have ended: diverged, through their budget, or pruned at a rung."""
        ended: list[tuple[Claim, Result]] = []
        at_rung: list[_Running] = []
        for running in alive:
            last = running.records[-1]
            if last.diverged_at_step is not None:
                ended.append((running.claim, self._result(running, "diverged")))
            elif last.epoch >= self.spec.budget.epochs:
                ended.append((running.claim, self._result(running, "complete")))
            elif last.epoch in self.rungs:
                at_rung.append(running)
        for running in at_rung:
            if self._report_and_ask_pruner(running):
                ended.append((running.claim, self._result(running, "pruned")))
        return ended

    def _report_and_ask_pruner(self, running: _Running) -> bool:
        held = running.claim
        assert held.trial_id is not None
        value = rung_value(self.spec.objective.metric, running.records, self.maximize)
        if value is None:
            return False
        self.search.report(held.optimizer, held.trial_id, running.records[-1].epoch, value)
        return self.search.should_prune(held.optimizer, held.trial_id)

    def _result(self, running: _Running, outcome: str) -> Result:
        measures = trial_measures(running.records, self.spec.budget.epochs)
        if outcome == "pruned":
            value = rung_value(self.spec.objective.metric, running.records, self.maximize)
        else:
            value = objective_value(measures, self.spec.objective.metric)
        return Result(outcome, value, flat_measures(measures))

    def _finish(self, results: Sequence[tuple[Claim, Result]]) -> None:
        """Fence, tell Optuna, done; the slots are free afterwards."""
        if not results:
            return
        kept = begin_finish(self.database, results)
        for held, result in kept:
            self._tell(held, result.outcome, result.value)
        end_finish(self.database, [held for held, _ in kept])
        for held, _ in results:
            del self.running[held.ticket_id]
            self.trainer.release(held.ticket_id)

    def _tell(self, held: Claim, outcome: str, value: float | None) -> None:
        trial_id = held.trial_id
        if trial_id is None:
            found = self.search.recall(held.optimizer, held.ticket_id)
            if found is None:
                return
            trial_id = found.trial_id
        self.search.tell(held.optimizer, trial_id, outcome, value)

    def _drop_lost(self, claims: Sequence[Claim], held: set[int]) -> None:
        """Free the slots of tickets that another worker has adopted; their results are discarded."""
        for lost in claims:
            if lost.ticket_id not in held:
                logger.warning("ticket %d was adopted by another worker; its trial ends here", lost.ticket_id)
                del self.running[lost.ticket_id]
                self.trainer.release(lost.ticket_id)


def trial_settings(held: Claim) -> TrialSettings:
    """What the trainer gets for a ticket."""
    assert held.settings is not None
    hyperparameters = {name: float(value) for name, value in held.settings.items() if name != "batch_size"}
    return TrialSettings(held.optimizer, hyperparameters, int(held.settings["batch_size"]), held.seed)


def rung_value(metric: str, records: Sequence[EpochRecord], maximize: bool) -> float | None:
    """What a trial reports at a rung: the best value of the objective so far, or the running mean or last value.

    `contraction` has no value before the end: its rungs report the distance to the optimum.
    """
    trained = records[1:]
    match metric:
        case "mean_valid_loss":
            values = [r.valid_loss for r in trained if r.valid_loss is not None]
            return sum(values) / len(values) if values else None
        case "final_valid_loss":
            return trained[-1].valid_loss
        case "train_loss":
            return trained[-1].train_loss
        case "contraction":
            return trained[-1].distance
    name = "valid_loss" if metric == "best_valid_loss" else metric
    found = [value for value in (r.value(name) for r in trained) if value is not None]
    if not found:
        return None
    return max(found) if maximize else min(found)


def flat_measures(measures: TrialMeasures) -> dict[str, Any]:
    """A trial's measures as plain JSON values; the task's metrics at the best epoch are `valid_<metric>`."""
    found = asdict(measures)
    best, final, initial = (found.pop(name) for name in ("best_metrics", "final_metrics", "initial_metrics"))
    found |= {f"valid_{name}": value for name, value in best.items()}
    found |= {f"final_valid_{name}": value for name, value in final.items()}
    found |= {f"initial_valid_{name}": value for name, value in initial.items()}
    return {name: value for name, value in found.items() if value is not None}


def run_worker(storage: str, options: WorkerOptions, stop: StopSignal) -> None:
    """Run a worker in this process until it ends."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    database = Database(storage)
    try:
        Worker(database, options, stop).run()
    finally:
        database.close()
