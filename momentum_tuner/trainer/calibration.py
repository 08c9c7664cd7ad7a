"""Which way of training is fastest here, by measurement: one slot at a time or fused, how wide, with how many threads.

The fastest is not guessed from the model: it depends on the processor's caches and libraries as much as on the layers.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from momentum_tuner.trainer.data import Batch
from momentum_tuner.trainer.memory import free_memory, is_out_of_memory
from momentum_tuner.trainer.objective import GRADIENT, Objective
from momentum_tuner.trainer.slots import evaluate
from momentum_tuner.trainer.stack import Stack
from momentum_tuner.trainer.state import TrialSettings, new_state
from momentum_tuner.trainer.update import UPDATE, Standing

SEQUENTIAL, FUSED, COMPILED = "sequential", "fused", "compiled"
MODES = (SEQUENTIAL, FUSED, COMPILED)
SEQUENTIAL_WIDTH = 2
"""Slots at once where they train one after the other: more would take as long for each, and be through later, so that
trials that begin meanwhile know less of others. A worker that dies would lose more, too."""
NARROWEST = 4
ENOUGH = 1.05
"""A way that takes at most this much longer than the fastest is as good: the narrowest of those is taken, as trials
that begin later know more of others, and as several workers share the memory, which a wide step needs more of."""
USUAL_GAIN = 1.3
USUAL_COMPILE_SECONDS = 40.0
KEPT_SECONDS = 1.0
"""What compiling is expected to gain and to take where nothing was measured, and to take where its result was kept."""
MARGIN = 1.5
"""Compiling must be expected to save so many times what it takes: trials may end early."""
BUDGET_SECONDS = 3.0
"""For all steps that are timed. What comes before them, such as capturing, says nothing of them."""
WINDOW_SECONDS = 0.04
LEAST_STEPS, MOST_STEPS = 3, 20
REPEATS = 3
CLOSE = 1.15
"""A way that takes at most this much longer than the fastest may be the fastest."""


@dataclass(frozen=True, order=True)
class Way:
    """A way of training.

    Attributes:
        mode: one of `MODES`.
        width: slots at once.
        threads: of the CPU, for each operation.
    """

    mode: str
    width: int
    threads: int


@dataclass(frozen=True)
class Calibration:
    """What was measured of a task on a device.

    Attributes:
        seconds: of one trial-step, by way.
        compile_seconds: what compiling took; None if that was not tried.
    """

    seconds: Mapping[Way, float] = field(default_factory=dict)
    compile_seconds: float | None = None

    @property
    def whole(self) -> bool:
        """Whether all ways were measured, and not some alone that a run was told to take."""
        return any(way.mode == SEQUENTIAL for way in self.seconds)

    def best(self, most: int | None = None) -> Way:
        """The way to take, of those up to a width that need no compiling."""
        ways = [way for way in self.seconds if way.mode != COMPILED]
        least = min((way.width for way in ways if way.mode == FUSED), default=0)  # stands for narrower ones
        allowed = [w for w in ways if w.mode == SEQUENTIAL or most is None or w.width <= max(most, least)]
        limit = ENOUGH * min(self.seconds[way] for way in allowed)
        good = [way for way in allowed if self.seconds[way] <= limit]
        return min(good, key=lambda way: (way.width, way.threads, self.seconds[way]))

    def least(self, mode: str) -> float:
        """Seconds of a trial-step at the fastest width in a mode; infinite if none was measured."""
        return min((seconds for way, seconds in self.seconds.items() if way.mode == mode), default=float("inf"))

    def of(self, mode: str, width: int, threads: int) -> float | None:
        """Seconds of a trial-step in a mode, at this width or the one measured nearest to it."""
        near = [way for way in self.seconds if (way.mode, way.threads) == (mode, threads)]
        return self.seconds[min(near, key=lambda way: abs(way.width - width))] if near else None

    def fastest_threads(self, mode: str, width: int) -> int:
        """With how many CPU threads an operation is fastest in a mode at about this width."""
        counts = {way.threads for way in self.seconds if way.mode == mode}
        return min(sorted(counts), key=lambda threads: self.of(mode, width, threads) or float("inf"))

    def having(self, way: Way, seconds: float, compile_seconds: float | None = None) -> Calibration:
        """The same with one more measurement."""
        took = self.compile_seconds if compile_seconds is None else compile_seconds
        return Calibration({**self.seconds, way: seconds}, took)

    def expects_to_repay(self, fused: Way, trial_steps: float, kept: bool) -> bool:
        """Whether compiling costs less time than it saves, by what was measured, or else by experience.

        Args:
            fused: the way of training that would be compiled.
            trial_steps: that are left to train.
            kept: whether the compiled code is there from an earlier run.
        """
        now = self.seconds[fused]
        then = self.of(COMPILED, fused.width, fused.threads) or now / USUAL_GAIN
        cost = KEPT_SECONDS if kept else self.compile_seconds or USUAL_COMPILE_SECONDS
        return trial_steps * (now - then) > MARGIN * cost


def calibrate(objective: Objective, batch: Batch, most: int, fused: bool = True) -> Calibration:
    """Measure the ways of training in a few seconds, from narrow to wide until a wider one is slower.

    Args:
        objective: of the task.
        batch: a minibatch that all slots share.
        most: the greatest width.
        fused: whether slots may train fused at all.
    """
    watch = Stopwatch(objective, batch)
    threads = torch.get_num_threads() if objective.device.type == "cpu" else 1
    found: dict[Way, float] = {}
    for count in sorted({1, threads}, reverse=True):
        way = Way(SEQUENTIAL, min(most, SEQUENTIAL_WIDTH), count)
        found[way] = watch.seconds(way)
        if fused:
            found |= _climb(watch, most, count)
    # What came close is measured again, in turns, as something else may have taken the processor meanwhile.
    for _ in range(REPEATS):
        close = [way for way, seconds in found.items() if seconds < CLOSE * min(found.values())]
        for way in close if len(close) > 1 else ():
            if watch.measured < BUDGET_SECONDS:
                found[way] = min(found[way], watch.seconds(way))
    return Calibration(found)


def _climb(watch: Stopwatch, most: int, threads: int) -> dict[Way, float]:
    """Seconds of a trial-step at growing widths, as long as they fall, memory suffices and time allows."""
    found: dict[Way, float] = {}
    width = min(NARROWEST, most)
    while width <= most:
        way = Way(FUSED, width, threads)
        seconds = watch.seconds_if_memory_suffices(way)
        if seconds is None:
            break
        found[way] = seconds
        if seconds > CLOSE * min(found.values()) or watch.measured + 6.0 * width * seconds > BUDGET_SECONDS:
            break
        width = most if width < most < 2 * width else 2 * width
    return found


class Stopwatch:
    """Times whole steps: gradient, measures and update.

    Args:
        objective: of the task.
        batch: a minibatch that all slots share.
    """

    def __init__(self, objective: Objective, batch: Batch) -> None:
        self._objective = objective
        self._batch = batch
        self._settings = TrialSettings("momentum", {"learning_rate": 0.0, "momentum": 0.9}, 1, 0)
        self._start = new_state(objective, self._settings).tensors
        self._started = time.perf_counter()
        self.measured = 0.0
        """Seconds that timed steps took."""

    @property
    def spent(self) -> float:
        """Seconds since it was made."""
        return time.perf_counter() - self._started

    def seconds_if_memory_suffices(self, way: Way) -> float | None:
        """As `seconds`, None if memory runs out."""
        try:
            return self.seconds(way)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_memory()
        return None

    def seconds(self, way: Way) -> float:
        """Seconds of a trial-step: the shortest of some steps, divided by the slots."""
        replay = self._objective.replay
        patience, replay.patience = replay.patience, 0
        before = torch.get_num_threads()
        if before != way.threads:
            torch.set_num_threads(way.threads)
        try:
            if way.mode == COMPILED:
                with replay.compiling(GRADIENT, UPDATE):
                    return self._timed(way.width, fused=True)
            if way.mode == FUSED:
                return self._timed(way.width, fused=True)
            alone = self._timed(1, fused=False)
            return alone if alone > WINDOW_SECONDS else min(alone, self._timed(way.width, fused=False))
        finally:
            replay.patience = patience
            if before != way.threads:
                torch.set_num_threads(before)

    def evaluate(self, width: int) -> None:
        """Evaluate some slots on the validation set."""
        replay = self._objective.replay
        patience, replay.patience = replay.patience, 0
        try:
            stack = self._stack(width)
            evaluate(self._objective, stack.rows, stack.buffers, None)
        finally:
            replay.patience = patience

    def _stack(self, width: int) -> Stack:
        return Stack(self._objective, [self._settings] * width, [self._start] * width)

    def _timed(self, width: int, fused: bool) -> float:
        stack = self._stack(width)
        keys = None
        if self._objective.draws or not fused:
            keys = torch.zeros(width, dtype=torch.int64, device=self._objective.device)
        ones, rate = stack.column([1.0] * width), stack.column([0.0] * width)
        standing = Standing(ones * torch.inf, ones > 0, ones)

        alone = self._objective.device.type == "cpu" and torch.get_num_threads() == 1
        # Others that take the processor meanwhile would make wide steps, which take long, look slower than narrow ones.
        clock = time.thread_time if alone else time.perf_counter

        def step() -> float:
            started = clock()
            grads, loss, stack.buffers = stack.gradient(self._batch, keys, None, fused)
            stack.step(grads, loss, standing, None, rate, None, ones)
            loss.cpu()  # waits for the device
            return clock() - started

        step()  # captures, allocates and compares
        times = [step()]
        while len(times) < LEAST_STEPS or (sum(times) < WINDOW_SECONDS and len(times) < MOST_STEPS):
            if sum(times) > BUDGET_SECONDS / 4:
                break
            times.append(step())
        self.measured += sum(times)
        return min(times) / width
