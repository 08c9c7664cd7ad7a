"""One worker on one study."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from momentum_tuner.checkpoints import CheckpointStore, SavedSlot
from momentum_tuner.database import Database
from momentum_tuner.errors import MomentumTunerError, StorageError
from momentum_tuner.faults import crash_point
from momentum_tuner.metrics import Target, TrialMeasures, objective_value, trial_measures
from momentum_tuner.search import AskedTrial, Search, TrialLostError
from momentum_tuner.spec import StudySpec
from momentum_tuner.tasks import Loop, Task, check_objective
from momentum_tuner.tickets import (
    Result,
    StudyRecord,
    assign_worker,
    begin_finish,
    claim,
    end_finish,
    finish_study,
    give_back,
    noted_trials,
    open_confirmation,
    read_epochs,
    set_trials,
    with_trial,
)
from momentum_tuner.trainer import AbandonedError, SlotsOutOfMemoryError, SlotState
from momentum_tuner.worker.held import Held, Stage
from momentum_tuner.worker.link import Link
from momentum_tuner.worker.pacing import Pacing
from momentum_tuner.worker.recording import Recorder
from momentum_tuner.worker.results import (
    failure,
    flat_measures,
    rung_value,
    smallest_batch_size,
    trial_settings,
)
from momentum_tuner.worker.saving import Saver
from momentum_tuner.worker.signals import StopSignal
from momentum_tuner.worker_options import WorkerOptions

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
MOST_UNWRITTEN = 20_000
"""Records that are kept in memory while the database does not answer; with more, training waits."""


class StudyWorker:
    """Trains trials of a study: an epoch of every slot, then what came of it.

    What decides how training goes on (pruning, the end of a trial, the next trial) comes between two epochs, as a slot
    that waited for it during an epoch would cost more; records and checkpoints are written while the next one trains.

    Args:
        database: studies and tickets.
        worker_id: who holds the tickets.
        study: the study to serve.
        task: its task, loaded.
        options: device, slots, grace.
        stop: the wish to drain.
        link: whether the database answers.
        store: where checkpoints are kept, if anywhere.
    """

    def __init__(
        self,
        database: Database,
        worker_id: str,
        study: StudyRecord,
        task: Task | Loop,
        options: WorkerOptions,
        stop: StopSignal,
        link: Link | None = None,
        store: CheckpointStore | None = None,
    ) -> None:
        self.database = database
        self.worker_id = worker_id
        self.study = study
        self.spec: StudySpec = study.spec
        self.options = options
        self.stop = stop
        self.link = link or Link()
        self.rungs = sorted(self.spec.rungs())
        self._smallest_batch = smallest_batch_size(self.spec)
        aim = self.spec.target_aim
        target = self.spec.target
        self.target = None if target == "auto" else Target(target, aim.metric, aim.maximize)
        for aim in self.spec.objective.aims:
            check_objective(aim.metric, task)
        self.pacing = Pacing(database, study, options)
        self.trainer = self.pacing.make_trainer(task, lambda: self.stop.asked)
        self.search = Search(database, self.spec, options.ordinal)
        self.saver = Saver(database, store, study, worker_id, options.checkpoint_seconds, options.grace_seconds)
        self.recorder = Recorder(database)
        self.held: dict[int, Held] = {}
        self._shown_width = 0

    def run(self, elsewhere: Callable[[], bool] = lambda: False) -> None:
        """Train until the study is done.

        Args:
            elsewhere: asked when all tickets that are left are in other workers' hands: whether to go and work there.
        """
        try:
            self._work(elsewhere)
        except BaseException:
            self._leave(save=False)
            raise
        self._leave(save=True)

    def _work(self, elsewhere: Callable[[], bool]) -> None:
        idle = 0.0
        while not self.stop.asked:
            answered = self._synchronize()
            if self.trainer.keys and (answered or self._unwritten() < MOST_UNWRITTEN):
                if answered:
                    self.pacing.consider_compiling(self.trainer, self._epochs_left(), self._save)
                self._train()
                idle = 0.0
            elif self.held:
                time.sleep(POLL_SECONDS / 20)  # until the database answers, or a checkpoint is written
            elif answered and self._is_over(elsewhere):
                return
            else:  # others hold the last tickets; they may be through with them soon, or die
                idle = min(max(2 * idle, POLL_SECONDS / 20), POLL_SECONDS)
                time.sleep(idle)

    def _synchronize(self) -> bool:
        """Bring the database and the slots up to date; whether the database answered all the while.

        Every step takes up what is there to do for it, so that what an error leaves is done the next time.
        """
        if not self.link.may_try:
            return False
        started = time.monotonic()
        try:
            with self.search.batch(fresh=False):
                self._bring_up_to_date()
        except StorageError as error:
            self.link.failed(error, time.monotonic() - started)
            return False
        self.link.worked()
        return True

    def _bring_up_to_date(self) -> None:
        self._show_width()
        self._take_recorded()
        self._note_trials()
        self._judge()
        self._record()
        self._finish()
        self.saver.note(self.held, wait=self.trainer.whole_epochs)  # before an epoch that may be long
        self._give_back()
        self._claim()
        self._finish()
        self._prepare()
        self._note_trials()
        self.recorder.begin(self._in(Stage.TRAINING))

    # The database

    def _show_width(self) -> None:
        if self._shown_width != self.trainer.width:
            assign_worker(self.database, self.worker_id, self.study.id, self.trainer.width)
            self._shown_width = self.trainer.width

    def _note_trials(self) -> None:
        """Note on the tickets of admitted trials which they are."""
        new = [h for h in self._in(Stage.TRAINING, Stage.ENDED, Stage.RETURNING) if not h.noted]
        if not new:
            return
        kept = {c.ticket_id for c in set_trials(self.database, [h.claim for h in new], [h.slot for h in new])}
        crash_point("noted")
        for held in self._drop_lost(new, kept):
            held.noted = True
        if len(kept) < len(new):  # another worker has the tickets, and these trials may belong to none
            self.search.fail_leftovers(lambda: noted_trials(self.database, self.study.id))

    def _record(self) -> None:
        """Write the records that what follows needs: of trials that have ended or leave, and of those in a checkpoint.

        Those of the others are written while the next epoch trains; after an outage all at once, to see whether it is
        over.
        """
        everything = self.saver.writing or self.link.failing
        self.recorder.begin([h for h in self.held.values() if everything or h.stage is not Stage.TRAINING])
        self._take_recorded()

    def _take_recorded(self) -> None:
        """Note what the database has by now."""
        written, kept = self.recorder.end()
        if written:
            crash_point("recorded")
        counts = {h.claim.ticket_id: count for h, count in written}
        for held in self._drop_lost([h for h, _ in written], kept):
            held.written = counts[held.claim.ticket_id]

    def _judge(self) -> None:
        """Report rungs to Optuna, and end the trials that the pruner stops; none of a confirmation."""
        aim = self.spec.objective.at_rungs
        judged: list[tuple[Held, set[int], float | None]] = []
        with self.search.batch():
            for held in self._in(Stage.TRAINING):
                if held.claim.kind == "confirm" or not held.records or held.judged == held.records[-1].epoch:
                    continue
                last = held.records[-1].epoch
                trial_id = held.claim.trial_id
                assert trial_id is not None
                rungs = {r for r in self.rungs if r <= last and (r not in held.reported or r == last)}
                reported = None
                for rung in sorted(rungs):
                    value = rung_value(aim.metric, held.records[: rung + 1], aim.maximize)
                    if value is not None:
                        self.search.report(held.claim.place, trial_id, rung, value)
                        reported = value
                stops = reported is not None and self.search.should_prune(held.claim.place, trial_id)
                judged.append((held, rungs, reported if stops else None))
        if any(rungs for _, rungs, _ in judged):
            crash_point("reported")
        for held, rungs, stopped_at in judged:
            held.reported |= rungs
            held.judged = held.records[-1].epoch
            if stopped_at is not None:
                self._end(held, Result("pruned", stopped_at, flat_measures(self._measures(held))))

    def _finish(self) -> None:
        """Fence results, tell Optuna, and be done with the tickets."""
        ended = [h for h in self._in(Stage.ENDED) if h.noted]
        if ended:
            kept = begin_finish(self.database, [(h.claim, h.result or Result("failed")) for h in ended])
            crash_point("fenced")
            for held in self._drop_lost(ended, {c.ticket_id for c, _ in kept}):
                held.stage = Stage.FENCED
        fenced = self._in(Stage.FENCED)
        with self.search.batch():
            for held in fenced:
                assert held.result is not None
                self._tell(held, held.result)
        for held in fenced:
            held.stage = Stage.TOLD
        if fenced:
            crash_point("told")
        told = self._in(Stage.TOLD)
        if told:
            end_finish(self.database, [h.claim for h in told])
            crash_point("done")
            self._forget(told)

    def _tell(self, held: Held, result: Result) -> None:
        trial_id = held.claim.trial_id
        if trial_id is None:
            try:
                found = self.search.recall(held.claim.place, held.claim.ticket_id)
            except TrialLostError:  # somebody has told it
                return
            if found is None:
                return
            trial_id = found.trial_id
        self.search.tell(held.claim.place, trial_id, result.outcome, result.value, result.second_value)

    def _give_back(self) -> None:
        """Return the tickets of trials that left their slots, once their checkpoint is noted."""
        returning = self._in(Stage.RETURNING)
        if returning and not self.saver.writing:
            give_back(self.database, [h.claim for h in returning])
            self._let_go(returning)

    def _claim(self) -> None:
        """Claim tickets for the free slots."""
        waiting = self._in(Stage.CLAIMED)
        claims = claim(
            self.database,
            self.study.id,
            self.worker_id,
            self.trainer.free - len(waiting),
            max_attempts=self.spec.max_attempts,
            grace_seconds=self.options.grace_seconds,
            adopt=self.link.outage.over_for(self.options.grace_seconds),
            holding=list(self.held),
            with_last_attempt=not any(h.last_attempt for h in self.held.values()),
        )
        for new in claims:
            held = Held(new, Stage.CLAIMED, asked=new.generation > 1)
            held.last_attempt = 1 < self.spec.max_attempts <= new.attempts
            if new.outcome is not None:
                held.stage = Stage.FENCED
                held.result = Result(new.outcome, new.value, second_value=new.second_value)
            self.held[new.ticket_id] = held
        if claims:
            crash_point("claimed")

    def _prepare(self) -> None:
        """Ask Optuna for the settings of claimed tickets, find where their trials go on, and admit them."""
        self._ask([h for h in self._in(Stage.CLAIMED) if h.claim.trial_id is None or h.claim.settings is None])
        claimed = self._in(Stage.CLAIMED)
        going_on = [h for h in claimed if h.claim.generation > 1 and not h.recorded]
        if going_on:
            self._recall(going_on)
        saved = self.saver.load([h for h in claimed if h.claim.checkpoint is not None])
        for held in claimed:
            if held.stage is not Stage.CLAIMED:
                continue
            if self.trainer.free > 0:
                self._admit(held, saved.get(held.claim.ticket_id))
            else:  # memory did not suffice for as many slots as there were when it was claimed
                held.stage = Stage.RETURNING

    def _ask(self, asking: Sequence[Held]) -> None:
        """Their Optuna trials: one that was asked for but never noted, or a new one."""
        new: list[Held] = []
        with self.search.batch():
            for held in asking:
                try:
                    found = self.search.recall(held.claim.place, held.claim.ticket_id) if held.asked else None
                except TrialLostError:
                    self._take(held, None)
                    continue
                if found is not None:
                    self._take(held, found)
                else:
                    new.append(held)
        if new:
            for held in new:
                held.asked = True
            trials = self.search.ask_all([(h.claim.place, h.claim.ticket_id, h.claim.fixed) for h in new])
            for held, trial in zip(new, trials, strict=True):
                self._take(held, trial)
            crash_point("asked")

    def _take(self, held: Held, trial: AskedTrial | None) -> None:
        """Let a ticket have its trial; None is one that was failed as it was asked for, as the ticket was adopted."""
        if trial is None:
            logger.warning("ticket %d was adopted by another worker while its trial began", held.claim.ticket_id)
            self._forget([held])
        else:
            settings = held.claim.settings or trial.settings
            held.claim = with_trial(held.claim, trial.trial_id, trial.number, settings)

    def _recall(self, going_on: Sequence[Held]) -> None:
        """What the database has of trials that others began."""
        recorded = read_epochs(self.database, [h.claim.ticket_id for h in going_on])
        for held in going_on:
            records = recorded[held.claim.ticket_id]
            if records:
                assert held.claim.trial_id is not None
                held.reported = self.search.reported(held.claim.place, held.claim.trial_id)
            held.recorded = {r.epoch: r for r in records}

    # The trainer

    def _admit(self, held: Held, saved: SavedSlot | None) -> None:
        """Give a trial a slot, from its checkpoint if that fits."""
        try:
            if saved is None or not self._continue(held, saved):
                held.position = (max(held.recorded, default=0), 0)  # what others came to, it only repeats
                record = self.trainer.admit(held.claim.ticket_id, trial_settings(held.claim))
                assert record is not None
                held.add(record)
            held.slot = self.trainer.slot_number(held.claim.ticket_id)
            held.stage = Stage.TRAINING
        except SlotsOutOfMemoryError as error:
            fitting = len(self.trainer.keys)
            if not fitting:
                held.end(Result("failed", reason=out_of_memory(error)))
                return
            held.stage = Stage.RETURNING
            logger.warning("%s; going on with the %d slots that fit", error, fitting)
            self.trainer.width = fitting
        except AbandonedError:
            return  # the worker stops, and gives its ticket back
        except MomentumTunerError:
            raise
        except Exception as error:
            held.end(failure(error))

    def _continue(self, held: Held, saved: SavedSlot) -> bool:
        """Admit a trial where its checkpoint left it; False if that does not fit what is known of it."""
        try:
            state = SlotState.restore(saved.tensors, saved.header)
            missing = [epoch for epoch in range(state.epoch + 1) if epoch not in held.recorded]
            if missing:
                raise ValueError(f"the database has no record of epoch {missing[0]}")
            self.trainer.admit(held.claim.ticket_id, trial_settings(held.claim), state)
        except ValueError as error:
            logger.warning("trial %s begins anew, its checkpoint is of no use: %s", held.claim.trial_number, error)
            return False
        held.records = [held.recorded.pop(epoch) for epoch in range(state.epoch + 1)]
        held.written = len(held.records)
        held.position = (state.epoch, state.epoch_steps)
        return True

    def _train(self) -> None:
        """Train to the end of the epoch, or until a checkpoint or the wish to drain comes between; then settle."""
        if not self._complete():  # trials that came back after their last epoch
            return
        trained: set[int] = set()
        try:
            for key, record in self.trainer.train_epoch(self._pause):
                assert isinstance(key, int)
                trained.add(key)
                held = self.held[key]
                held.add(record)
                if record.diverged_at_step is not None:
                    self._end(held, self._result(held, "diverged", self._measures(held)))
        except SlotsOutOfMemoryError as error:
            self._complete()
            self._halve(error)
        except MomentumTunerError:
            raise
        except Exception as error:
            failed = failure(error)
            logger.error("an epoch failed: %s", failed.reason)
            for held in self._in(Stage.TRAINING):
                if held.claim.ticket_id not in self.trainer.failed:
                    continue
                if self.stop.asked:  # perhaps of that: with a service's processes end those of a DataLoader
                    self.trainer.release(held.claim.ticket_id)
                    held.stage = Stage.RETURNING
                else:
                    self._end(held, failed)
        self._complete()
        if any(h.last_attempt and h.claim.ticket_id in trained for h in self.held.values()):
            self.saver.hasten()  # it has come further than those that died of it, or of a neighbour
        if self.saver.due:
            self.saver.begin(self._in(Stage.TRAINING), self.trainer.export)

    def _pause(self) -> bool:
        return self.stop.asked or self.saver.due or (self.saver.written and self.link.may_try)

    def _save(self) -> None:
        """Have a checkpoint of what trains: who is asked to stop has less time than what comes now may take."""
        self.saver.begin(self._in(Stage.TRAINING), self.trainer.export)
        try:
            self._take_recorded()
            self._record()
            self.saver.note(self.held, wait=True)
        except StorageError as error:
            self.link.failed(error)

    def _complete(self) -> bool:
        """End the trials that are through their budget, with their stability measured; False if a wish to drain came.

        Those that this leaves unmeasured are measured where they go on from their checkpoint; without checkpoints they
        end as they are.
        """
        through = [h for h in self._in(Stage.TRAINING) if h.records[-1].epoch >= self.spec.budget.epochs]
        keys = [h.claim.ticket_id for h in through]
        sharpness = self.trainer.sharpness(keys, pause=lambda: self.stop.asked)
        for held, key in zip(through, keys, strict=True):
            if key in sharpness or not self.saver.keeps:
                found = sharpness.get(key)
                margin = None if found is None else self.trainer.stability_margin(key, found)
                measures = replace(self._measures(held), sharpness=found, stability_margin=margin)
                self._end(held, self._result(held, "complete", measures))
        return len(sharpness) == len(through)

    def _result(self, held: Held, outcome: str, measures: TrialMeasures) -> Result:
        budget, common = (
            self.spec.budget.epochs * self.trainer.steps_per_epoch(size)
            for size in (trial_settings(held.claim).batch_size, self._smallest_batch)
        )
        values = [objective_value(measures, aim.metric, budget, common) for aim in self.spec.objective.aims]
        second = values[1] if len(values) > 1 else None
        return Result(outcome, values[0], flat_measures(measures), second_value=second)

    def _measures(self, held: Held) -> TrialMeasures:
        return trial_measures(held.records, self.spec.budget.epochs, self.target)

    def _end(self, held: Held, result: Result) -> None:
        """Note a trial's result, and free its slot."""
        self.trainer.release(held.claim.ticket_id)
        held.end(result)

    def _halve(self, error: SlotsOutOfMemoryError) -> None:
        """Go on with half the slots; the other trials go back to the queue from where they are."""
        training = self._in(Stage.TRAINING)
        if len(training) == 1:
            self._end(training[0], Result("failed", reason=out_of_memory(error)))
            return
        keep = len(training) // 2
        logger.warning("%s; going on with %d of %d slots", error, keep, len(training))
        leaving = training[keep:]
        self.saver.begin(leaving, self.trainer.export)
        for held in leaving:
            self.trainer.release(held.claim.ticket_id)
            held.stage = Stage.RETURNING
        self.trainer.width = keep

    # The end

    def _is_over(self, elsewhere: Callable[[], bool]) -> bool:
        """Whether this worker is done here: the study is, or there is work elsewhere."""
        try:
            if all(done for _, done in noted_trials(self.database, self.study.id).values()):
                self.search.fail_leftovers(lambda: noted_trials(self.database, self.study.id))
                if open_confirmation(self.database, self.study.id):
                    crash_point("opened")
                    return False
                self.saver.forget()
                if finish_study(self.database, self.study.id):
                    return True
            return elsewhere()
        except StorageError as error:
            self.link.failed(error)
            return False

    def _leave(self, save: bool) -> None:
        """Record, save and give back what is still in hand.

        Args:
            save: whether the trainer's state is sound.
        """
        try:
            if save and self.held:
                with contextlib.suppress(StorageError):  # of an outage that may be over: it is written again
                    self._take_recorded()
                self._note_trials()
                self.recorder.begin(list(self.held.values()))
                self._take_recorded()
                self.saver.note(self.held, wait=True)
                self.saver.begin(self._in(Stage.TRAINING), self.trainer.export)
                self.saver.note(self.held, wait=True)
                self._finish()
            give_back(self.database, [h.claim for h in self.held.values()])
            assign_worker(self.database, self.worker_id, None, 0)
        except StorageError as error:
            logger.warning("%s; its trials go on elsewhere after %.0f s", error, self.options.grace_seconds)
        finally:
            self.recorder.close()
            self.saver.close()
            self.search.close()

    # What is held

    def _in(self, *stages: Stage) -> list[Held]:
        return [h for h in self.held.values() if h.stage in stages]

    def _epochs_left(self) -> int:
        """Epochs left to train of the trials that hold a slot."""
        training = self._in(Stage.TRAINING)
        return sum(self.spec.budget.epochs - held.records[-1].epoch for held in training if held.records)

    def _unwritten(self) -> int:
        return sum(len(h.records) - h.written for h in self.held.values())

    def _drop_lost(self, asked: Sequence[Held], kept: set[int]) -> list[Held]:
        """Let go of tickets that another worker has adopted; what was computed for them is discarded."""
        lost = [h for h in asked if h.claim.ticket_id not in kept]
        for held in lost:
            logger.warning("ticket %d was adopted by another worker; its trial ends here", held.claim.ticket_id)
            if held.stage is Stage.TRAINING:
                self.trainer.release(held.claim.ticket_id)
        self._let_go(lost)
        return [h for h in asked if h.claim.ticket_id in kept]

    def _let_go(self, these: Sequence[Held]) -> None:
        """Leave tickets to other workers."""
        self.search.let_go([h.claim.trial_id for h in these if h.claim.trial_id is not None])
        self._forget(these)

    def _forget(self, these: Sequence[Held]) -> None:
        for held in these:
            del self.held[held.claim.ticket_id]


def out_of_memory(error: SlotsOutOfMemoryError) -> str:
    """Why a trial failed that not even a slot of its own had memory for."""
    return f"out of memory with one slot: {error}"
