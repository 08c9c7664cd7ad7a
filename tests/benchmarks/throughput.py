"""Trial-steps per second: the trainer's slots against the plain torch loop on the same cores.

Run by hand; nothing is asserted, as times are the machine's:

    python tests/benchmarks/throughput.py
    python tests/benchmarks/throughput.py --task digits_mlp digits_rnn --cell lstm --width 1 64 --seconds 5
    python tests/benchmarks/throughput.py --json > rows.json       # hardware and versions go to stderr
    python tests/benchmarks/throughput.py --steps 5 --seconds 0.2 --rounds 1    # does it work? not a measurement

A trial-step is one optimizer step of one trial. Each way runs in two layouts: one process with a thread per core,
and one process per core with one thread each, which start together and count over the same window.

- plain: one hand-written loop per process, data in memory, one gather per epoch (see README.md),
  `torch.optim.SGD` with Nesterov momentum and torch's fused kernel. The better layout is the
  baseline, ratio 1.
- fused: `Trainer.train_epoch` in steady state, the width divided among the processes. Its measures of every step and
  the evaluation after every epoch are included; the plain loop evaluates too. A model that vmap cannot batch trains one
  slot at a time, here as in a study; a line under the table says so.
  Compiled, its gradients are: that takes a minute or so per task and layout, before the first window.
- chosen: what a worker of `run` does when asked for nothing: width, threads, one at a time or fused, as it measures
  when it starts, on as many processes as `--workers auto` gives. Compiled, it then also considers compiling with a
  long study ahead, and keeps the compiled code where that is faster. Its width is what was chosen.
- matmul share: what torch's FlopCounterMode counts in one plain forward and backward pass (matrix products and
  convolutions) times trial-steps per second, over this machine's rate at a large float32 matrix product, the better
  layout's. None for a task without any.

The width is that of all processes together, so for plain it is their number.
All ways take turns within every round, each round in the opposite direction, so that a busy spell hits all alike;
the figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError

import numpy as np
import torch
from loops import BATCH_SIZE, MATMUL_SIZE, Loop, Problem, count_flop, matmul_loop, plain_loop, trainer_loop
from output import Output, at_least, command_line
from rich.box import SIMPLE_HEAD
from rich.table import Table

from momentum_tuner.fork_server import KEEP_MEMORY
from momentum_tuner.launcher.devices import available_cores, plan_workers
from momentum_tuner.tasks import Task
from momentum_tuner.trainer import FUSED_WIDTH, Trainer

TASKS = ("digits_mlp", "digits_rnn", "digits_cnn", "digits_transformer", "quadratic")
CELLS = ("rnn", "lstm", "gru")
PATIENCE = 600.0
"""Seconds that a process waits for the others at the start of a window."""


@dataclass(frozen=True)
class Layout:
    """How the cores are shared out."""

    processes: int
    threads: int

    def __str__(self) -> str:
        def count(number: int, noun: str, plural: str) -> str:
            return f"{number} {noun if number == 1 else plural}"

        return f"{count(self.processes, 'process', 'processes')} x {count(self.threads, 'thread', 'threads')}"


@dataclass(frozen=True)
class Way:
    """One way to train, in one layout.

    Attributes:
        kind: `plain`, `fused`, `chosen`, or `matmul`, the machine's own rate.
        layout: of its processes.
        width: trials at once, over all processes; None for what is chosen.
        compiled: whether torch.compile is used.
    """

    kind: str
    layout: Layout
    width: int | None
    compiled: bool = False

    def __str__(self) -> str:
        width = "" if self.width is None else f", width {self.width}"
        return f"{self.kind}, {self.layout}{width}{', compiled' if self.compiled else ''}"

    def share(self, process: int) -> int | None:
        """Trials that one of the processes trains; None for its choice."""
        if self.width is None:
            return None
        return self.width // self.layout.processes + (process < self.width % self.layout.processes)


@dataclass(frozen=True)
class Window:
    """What one process did in a window: the clock and the work done so far, at its start and after each epoch."""

    times: list[float]
    done: list[int]


@dataclass(frozen=True)
class Facts:
    """What a process knows of the problem.

    Attributes:
        flop: operations of a trial-step.
        reason: why slots do not train fused, if they do not.
        widths: trials that it trains at once, by way.
    """

    flop: int
    reason: str | None
    widths: dict[Way, int]


@dataclass(frozen=True)
class Row:
    """One line of the result; `ratio` is to the best plain layout."""

    task: str
    way: str
    width: int
    compiled: bool
    steps_per_second: float
    ratio: float
    matmul_share: float | None


@dataclass
class Result:
    """All rounds of one problem: a rate by way and round (trial-steps or operations per second)."""

    problem: Problem
    facts: Facts
    widths: dict[Way, int]
    rates: dict[Way, list[float]] = field(default_factory=dict)

    def median(self, way: Way) -> float:
        """The way's rate."""
        return statistics.median(self.rates[way])

    def of_kind(self, kind: str) -> list[Way]:
        """The ways of a kind."""
        return [way for way in self.rates if way.kind == kind]

    def rows(self) -> list[tuple[Way, Row]]:
        """The lines of all ways but the machine's own rate."""
        baseline = max(self.median(way) for way in self.of_kind("plain"))
        machine = max(self.median(way) for way in self.of_kind("matmul"))
        rows = []
        for way in [way for kind in ("plain", "fused", "chosen") for way in self.of_kind(kind)]:
            rate = self.median(way)
            share = rate * self.facts.flop / machine if self.facts.flop else None
            width = self.widths[way]
            rows.append((way, Row(str(self.problem), way.kind, width, way.compiled, rate, rate / baseline, share)))
        return rows

    def best_rows(self) -> list[Row]:
        """Of each way, eager and compiled, the rows of the better layout; of the plain loop a single one."""
        best: dict[tuple[str, int | None, bool], Row] = {}
        for way, row in self.rows():
            key = row.way, None if row.way == "plain" else way.width, row.compiled
            if key not in best or row.steps_per_second > best[key].steps_per_second:
                best[key] = row
        return list(best.values())


# In a measuring process.

_barrier: Barrier
_loops: dict[Way, Loop] = {}
_threads: dict[Way, int] = {}


def join(barrier: Barrier) -> None:
    """Start a measuring process, one of those that meet at `barrier`."""
    global _barrier
    _barrier = barrier


def prepare(problem: Problem, ways: Sequence[Way], process: int) -> Facts:
    """Build the loops of all ways of this process's layout and let each run an epoch."""
    task = problem.build()
    reason = None
    widths = {}
    for way in ways:
        torch.set_num_threads(way.layout.threads)
        widths[way] = 1
        if way.kind == "plain":
            _loops[way] = plain_loop(task)
        elif way.kind == "matmul":
            _loops[way] = matmul_loop()
        else:
            trainer = make_trainer(task, way, process)
            _loops[way] = trainer_loop(trainer)
            widths[way] = trainer.width
            reason = trainer.objective.reason if way.kind == "fused" else reason
        _threads[way] = torch.get_num_threads()
        _loops[way]()
    return Facts(count_flop(task), reason, widths)


def make_trainer(task: Task, way: Way, process: int) -> Trainer:
    """The trainer of a way; a chosen one sets the threads of this process, as a worker does."""
    if way.kind == "fused":
        return Trainer(task, epochs=1, slots=way.share(process), compiles="on" if way.compiled else "off")
    most = max(1, FUSED_WIDTH // way.layout.processes)
    trainer = Trainer(task, epochs=1, most=most, compiles="auto" if way.compiled else "off", batch_size=BATCH_SIZE)
    if trainer.pace.threads is not None:
        torch.set_num_threads(trainer.pace.threads)
    while not trainer.consider_compiling(float("inf")):
        time.sleep(1.0)
    return trainer


def run(way: Way, seconds: float) -> Window:
    """Warm up for an epoch, wait for the other processes, then train whole epochs for at least `seconds`."""
    torch.set_num_threads(_threads[way])
    loop = _loops[way]
    loop()
    _barrier.wait(PATIENCE)
    window = Window([time.perf_counter()], [0])
    while window.times[-1] < window.times[0] + seconds:
        done = loop()
        window.times.append(time.perf_counter())
        window.done.append(window.done[-1] + done)
    return window


# In the main process.


class Crew:
    """The measuring processes of one layout; they live for all rounds of a problem and sleep while others measure.

    Args:
        problem: what they train.
        ways: those of this layout.
    """

    def __init__(self, problem: Problem, ways: Sequence[Way]) -> None:
        context = multiprocessing.get_context("spawn")
        count = ways[0].layout.processes
        self._barrier = context.Barrier(count)
        self._processes = [
            ProcessPoolExecutor(1, context, initializer=join, initargs=(self._barrier,)) for _ in range(count)
        ]
        prepared = [process.submit(prepare, problem, ways, i) for i, process in enumerate(self._processes)]
        found = [future.result() for future in prepared]
        self.facts = found[0]
        self.widths = {way: sum(facts.widths[way] for facts in found) for way in ways}

    def rate(self, way: Way, seconds: float) -> float:
        """Work per second over the time in which all processes were measuring."""
        futures = [process.submit(run, way, seconds) for process in self._processes]
        wait(futures, return_when=FIRST_EXCEPTION)
        if not all(future.done() for future in futures):
            self._barrier.abort()  # so that none waits for the one that failed
        # What went wrong first, before the broken barrier that it left to the others.
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise min(errors, key=lambda error: isinstance(error, BrokenBarrierError))
        windows = [future.result() for future in futures]
        start = max(window.times[0] for window in windows)
        end = min(window.times[-1] for window in windows)
        # An epoch that the common window cuts counts in part.
        done = sum(np.interp([start, end], window.times, window.done) @ (-1.0, 1.0) for window in windows)
        return float(done / (end - start))

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.shutdown(cancel_futures=True)


def workers_layout() -> Layout:
    """The processes of `--workers auto`."""
    placements = plan_workers("auto", "cpu")
    return Layout(len(placements), placements[0].threads or available_cores())


def layouts() -> list[Layout]:
    """One process with all cores, one process per core, and that of workers."""
    cores = available_cores()
    return list(dict.fromkeys([Layout(1, cores), Layout(cores, 1), workers_layout()]))


def ways_of(layout: Layout, widths: Sequence[int], compiled: Sequence[bool]) -> list[Way]:
    """What is measured in a layout; a width smaller than its processes cannot be divided and is left out."""
    fused = [Way("fused", layout, width, code) for width in widths if width >= layout.processes for code in compiled]
    chosen = [Way("chosen", layout, None, code) for code in compiled if layout == workers_layout()]
    return [Way("plain", layout, layout.processes), *fused, *chosen, Way("matmul", layout, layout.processes)]


def measure(
    problem: Problem,
    widths: Sequence[int],
    compiled: Sequence[bool],
    seconds: float,
    rounds: int,
    tell: Callable[[str], None],
) -> Result:
    """Measure one problem in all ways, taking turns; `tell` hears what is going on."""
    tell(f"{problem}: preparing")
    with ExitStack() as stack:
        crews: dict[Layout, Crew] = {}
        for layout in layouts():
            crews[layout] = Crew(problem, ways_of(layout, widths, compiled))
            stack.callback(crews[layout].close)
        # By kind and width, so that what is compared is measured close together.
        ways = [way for layout in crews for way in ways_of(layout, widths, compiled)]
        ways.sort(key=lambda way: (way.kind != "plain", way.width or 0))
        counts = {way: crews[way.layout].widths[way] for way in ways}
        result = Result(problem, next(iter(crews.values())).facts, counts, {way: [] for way in ways})
        for turn in range(rounds):
            for way in ways if turn % 2 == 0 else reversed(ways):
                tell(f"{problem}: round {turn + 1} of {rounds}: {way}")
                result.rates[way].append(crews[way.layout].rate(way, seconds))
    return result


def table_of(result: Result) -> Table:
    """The result as a person reads it."""
    table = Table(title=str(result.problem), title_justify="left", box=SIMPLE_HEAD)
    table.add_column("way")
    for name in ("processes\nx threads", "width", "trial-steps\nper second", "over\nrounds", "ratio", "matmul\nshare"):
        table.add_column(name, justify="right", no_wrap=True)
    for way, row in result.rows():
        rates = result.rates[way]
        table.add_row(
            f"{way.kind}, compiled" if way.compiled else way.kind,
            f"{way.layout.processes} x {way.layout.threads}",
            str(row.width),
            f"{row.steps_per_second:,.0f}",
            f"{min(rates):,.0f} - {max(rates):,.0f}",
            f"{row.ratio:.2f}",
            "-" if row.matmul_share is None else f"{row.matmul_share:.1%}",
        )
    return table


def notes(result: Result) -> list[str]:
    """What belongs under a problem's table."""
    rates = ", ".join(f"{result.median(way) / 1e9:,.0f} GFLOP/s ({way.layout})" for way in result.of_kind("matmul"))
    lines = [
        f"{result.facts.flop:,} FLOP in the products of a trial-step",
        f"float32 product of {MATMUL_SIZE} x {MATMUL_SIZE}: {rates}",
    ]
    if result.facts.reason is not None:
        lines.append(f"'fused' trains one slot at a time here: {result.facts.reason}")
    return lines


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_line(__doc__)
    count = at_least(int, 1)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=CELLS, help="cells of digits_rnn")
    parser.add_argument("--width", nargs="+", type=count, default=[1, 16, 64], help="trials at once")
    parser.add_argument("--eager", action="store_true", help="leave out what is compiled")
    parser.add_argument("--seconds", type=at_least(float, 0.2), default=3.0, help="of each window")
    parser.add_argument("--rounds", type=count, default=3, help="windows of each way")
    parser.add_argument("--steps", type=count, help="steps of an epoch; fewer only to see that it runs")
    return parser.parse_args()


def main() -> None:
    """Measure, print."""
    asked = arguments()
    os.environ.update(KEEP_MEMORY)  # as the launcher does for workers; here for every way alike
    problems = []
    for task in asked.task:
        kinds = [(("cell", cell),) for cell in asked.cell] if task == "digits_rnn" else [()]
        problems += [Problem(task, kind, asked.steps) for kind in kinds]
    compiled = (False,) if asked.eager else (False, True)
    out = Output(asked.json)
    results = []
    with out.aside.status("starting") as status:
        for problem in problems:
            result = measure(problem, sorted(set(asked.width)), compiled, asked.seconds, asked.rounds, status.update)
            results.append(result)
            out.table(table_of(result))
            for line in notes(result):
                out.line(line)
            out.line()
    out.end([row for result in results for row in result.best_rows()])


if __name__ == "__main__":
    main()
