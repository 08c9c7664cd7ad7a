"""Workers, as actors that follow the nodes of a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import sqlalchemy as sa
from ray.exceptions import RayActorError, RayError

from momentum_tuner.database import Database, Worker
from momentum_tuner.errors import InputError, StorageError
from momentum_tuner.fork_server import KEEP_MEMORY
from momentum_tuner.launcher.local import DRAIN_SECONDS, RESTARTS, LocalWorkers, WorkerFailure, trials_done
from momentum_tuner.launcher.ray import cluster
from momentum_tuner.launcher.ray.actor import Ended, Place, WorkerActor
from momentum_tuner.launcher.ray.cluster import Demand, Node, check_device, choose_demand
from momentum_tuner.launcher.submitting import load_checked_task
from momentum_tuner.spec import StudySpec
from momentum_tuner.worker_options import WorkerOptions

FOLLOW_SECONDS = 1.0
"""How often the cluster is asked for its nodes."""


@dataclass(frozen=True)
class RayOptions:
    """How workers are placed on a cluster.

    Attributes:
        address: of the cluster; None for a Ray of our own on this machine.
        workers: `auto` for as many as the cluster has room for, or a number.
        device: `auto`, `cpu` or `cuda`.
        gpus_per_worker: 1 or a part of a GPU; None for the choice.
    """

    address: str | None
    workers: str
    device: str
    gpus_per_worker: float | None


@dataclass
class _Actor:
    """An actor: where it is, once Ray has found room for it, and what it does, once it has begun.

    `lost_on` names the nodes on which those that it stands for were lost.
    """

    handle: Any
    placing: ray.ObjectRef[Place]
    lost_on: tuple[str, ...]
    place: Place | None = None
    node: str = ""
    work: Any = None
    draining: bool = False


class RayWorkers:
    """Starts workers as actors, watches them, replaces those that are lost, and passes on the wish to stop.

    It has the methods of `LocalWorkers`. The database stays the only coordination: an actor gets its orders once, and
    what it held when its node is lost is adopted as from any other worker. The publisher is a child process here.

    Args:
        database: where they find their work.
        options: what each serves; device, threads, node and ordinal are set for each.
        ray_options: how they are placed.
        say: gets each line that a worker or the publisher writes.
        log_level: of the workers and the publisher.

    Raises:
        InputError: the number of workers, the device or the part of a GPU is none.
    """

    def __init__(
        self,
        database: Database,
        options: WorkerOptions,
        ray_options: RayOptions,
        say: Callable[[str], None],
        log_level: int = logging.WARNING,
    ) -> None:
        check_device(ray_options.device, ray_options.gpus_per_worker)
        self.database = database
        self.failures: list[WorkerFailure] = []
        self._options = options
        self._placing = ray_options
        self._count = _number(ray_options.workers)
        self._say = say
        self._said: set[str] = set()
        self._log_level = log_level
        self._publisher = LocalWorkers(database, options, [], say, log_level)
        self._demand = Demand()
        self._nodes: dict[str, Node] = {}
        self._actors: list[_Actor] = []
        self._lost: list[tuple[str, ...]] = []
        self._spawned = 0
        self._done_before = 0
        self._started = False
        self._stopping = False
        self._finished = False
        self._follow_at = 0.0
        self._drain_until = 0.0

    def prepare(self, publish: bool) -> None:
        """Join the cluster and place the actors, so that they import what they need while the study is checked.

        Raises:
            InputError: the cluster does not answer, or has nodes that cannot reach the database or lack the device.
        """
        ours = cluster.connect(self._placing.address)
        if self._stopping:
            return
        found = cluster.nodes()
        self._demand = choose_demand(self._placing.device, self._placing.gpus_per_worker, found, ours)
        if self.database.dialect == "sqlite":
            self._demand = replace(
                self._demand, address=cluster.only_machine(found, cluster.this_node(found), self.database.shown)
            )
        self._follow()
        self._publisher.prepare(publish)

    def check_task(self, spec: StudySpec, folder: Path, trusted: Sequence[str]) -> None:
        """As `load_checked_task`, in this process."""
        load_checked_task(spec, folder, trusted)

    def start(self, studies: Sequence[str], tracking_uri: str | None) -> None:
        """Let workers begin as soon as they are placed, and the publisher at once.

        Args:
            studies: what the publisher shows, empty for every study.
            tracking_uri: where to; None if there is no publisher.
        """
        self._started = True
        self._publisher.start(studies, tracking_uri)

    def watch(self) -> bool:
        """Look after the workers once; True while any of them runs or waits for room."""
        for actor in list(self._actors):
            self._look_after(actor)
        if self._stopping:
            self._let_go()
        elif time.monotonic() > self._follow_at:
            self._follow()
        return bool(self._actors) or self._wanted() > 0

    def rest(self, seconds: float) -> None:
        """Wait for so long."""
        time.sleep(seconds)

    def drain(self) -> None:
        """Ask the workers to give their trials back and end; `watch` passes it on and gives them 8 s.

        A signal may come in the middle of a call of Ray, so that nothing is called here.
        """
        if not self._stopping:
            self._stopping = True
            self._drain_until = time.monotonic() + DRAIN_SECONDS
            self._publisher.drain()  # it has no workers; its publisher has as long as all of it

    def stop(self) -> None:
        """Drain, wait for the end, and leave the cluster; one of our own ends."""
        self.drain()
        while self.watch():
            time.sleep(0.05)
        ray.shutdown()

    def kill(self) -> None:
        """End all workers at the next `watch`, as a second Ctrl-C does."""
        self._stopping, self._drain_until = True, 0.0

    def finish_publishing(self, seconds: float) -> bool:
        """Let the publisher show the rest, for so long at most; returns whether MLflow shows everything."""
        return self._publisher.finish_publishing(seconds)

    def _wanted(self) -> int:
        """How many workers there should be now."""
        if self._stopping or self._finished:
            return 0
        count = sum(self._demand.room(n) for n in self._nodes.values()) if self._count is None else self._count
        if self._count is None and not self.failures:
            count = max(1, count)  # it waits for a node
        return max(0, count - len(self.failures))

    def _follow(self) -> None:
        """Have as many actors as the cluster has room for now."""
        self._see_nodes()
        self._finished = self._finished or self._done_elsewhere()
        wanted, room = self._wanted(), sum(self._demand.room(node) for node in self._nodes.values())
        if room < wanted:
            self._say_once(f"the Ray cluster has room for {room} of {wanted} worker(s) now; the others wait")
        waiting = [actor for actor in self._actors if actor.place is None]
        for actor in waiting[: max(0, len(self._actors) - wanted)]:
            self._remove(actor)
        while len(self._actors) < wanted:
            self._actors.append(self._spawn())
        self._follow_at = time.monotonic() + FOLLOW_SECONDS

    def _see_nodes(self) -> None:
        self._nodes = {node.id: node for node in cluster.nodes()}

    def _done_elsewhere(self) -> bool:
        """Whether, while none of ours has room, others have left nothing to do."""
        if not self._started or self._options.forever or any(actor.place for actor in self._actors):
            return False
        from momentum_tuner.tickets import find_study, list_studies

        names = self._options.studies
        with contextlib.suppress(StorageError):
            studies = [find_study(self.database, n) for n in names] if names else list_studies(self.database)
            return all(study.phase == "done" for study in studies)
        return False

    def _spawn(self) -> _Actor:
        environment = dict(KEEP_MEMORY)
        if not self._demand.gpus:
            environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        actor_class: Any = ray.remote(WorkerActor)
        handle = actor_class.options(
            num_cpus=1,
            num_gpus=self._demand.gpus,
            resources=self._demand.resources(),
            max_restarts=0,
            max_concurrency=3,
            scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment},
        ).remote(self._log_level, os.getcwd())
        return _Actor(handle, handle.place.remote(), self._lost.pop() if self._lost else ())

    def _look_after(self, actor: _Actor) -> None:
        try:
            if actor.place is None and _ready(actor.placing):
                actor.place = ray.get(actor.placing)
            if actor.place is not None and actor.work is None and self._started and not self._stopping:
                self._begin(actor, actor.place)
            while actor.work is not None and _ready(actor.work):
                said = ray.get(next(actor.work))
                if isinstance(said, Ended):
                    self._end(actor, said)
                    return
                self._say_once(said)
        except RayActorError as error:
            if error.actor_init_failed:
                self._remove(actor)
                self.failures.append(WorkerFailure(2, _cannot_start(error)))
            else:
                self._lose(actor, _reason(error))
        except RayError as error:
            self._lose(actor, _reason(error))

    def _begin(self, actor: _Actor, place: Place) -> None:
        """Give a placed actor its orders. The URL of the database goes straight to it, not by way of Ray's head."""
        if place.node_id not in self._nodes:
            self._see_nodes()
        node = self._nodes.get(place.node_id)
        if node is None:
            self._lose(actor, "its node left")
            return
        actor.node = node.shown
        sharing = self._demand.sharing(node)
        options = replace(
            self._options,
            device=self._demand.device,
            sharing=sharing if self._count is None else min(sharing, self._count),
            threads=None if self._demand.gpus else 1,
            ordinal=self._options.ordinal + self._spawned,
            node=actor.node,
        )
        self._spawned += 1
        actor.work = actor.handle.work.options(num_returns="streaming").remote(self.database.text, options)

    def _end(self, actor: _Actor, ended: Ended) -> None:
        """A worker ended by itself: there is nothing left to do, or an error that another one would meet too."""
        self._remove(actor)
        if ended.exit_code:
            self.failures.append(WorkerFailure(ended.exit_code, ended.message))
        else:
            self._finished = True

    def _lose(self, actor: _Actor, reason: str) -> None:
        """An actor died, or its node; not replaced for ever where the nodes live and no trial ends in between."""
        self._remove(actor)
        if self._stopping:
            return
        node_id = actor.place.node_id if actor.place is not None else ""
        done = trials_done(self.database)
        lost_on = (*(actor.lost_on if done == self._done_before else ()), node_id)
        self._done_before = done
        crashes = [name for name in lost_on if not name or name in self._nodes]
        where = f" on {actor.node}" if actor.node else ""
        if len(crashes) > RESTARTS:
            self.failures.append(WorkerFailure(1, f"a worker{where} was lost: {reason}"))
        else:
            self._say(f"a worker{where} was lost; another one takes over its trials")
            self._lost.append(lost_on)

    def _let_go(self) -> None:
        """Pass on the wish to drain; end what has not begun, and what does not end in time."""
        for actor in list(self._actors):
            if actor.work is None or time.monotonic() > self._drain_until:
                self._remove(actor)
            elif not actor.draining:
                actor.draining = True
                actor.handle.drain.remote()

    def _remove(self, actor: _Actor) -> None:
        """Be sure that an actor is gone, and note it at once: others need not wait for its heartbeat to grow old."""
        self._actors.remove(actor)
        with contextlib.suppress(RayError):
            ray.kill(actor.handle)
        if actor.work is None or actor.place is None:
            return
        mine = (Worker.node == actor.node, Worker.pid == actor.place.pid)
        with contextlib.suppress(StorageError), self.database.write() as session:
            session.execute(sa.update(Worker).where(*mine).values(state="stopped"))

    def _say_once(self, line: str) -> None:
        """Workers of one study have the same to say."""
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def _ready(reference: Any) -> bool:
    """Whether a result, or the next one of a stream, is there."""
    return bool(ray.wait([reference], timeout=0)[0])


def _number(workers: str) -> int | None:
    """`--workers`: a number above 0, None for auto."""
    if workers == "auto":
        return None
    if workers.isdecimal() and int(workers) > 0:
        return int(workers)
    raise InputError(f"--workers {workers!r}: write a number above 0, or auto")


def _reason(error: RayError) -> str:
    """The last line of what Ray says."""
    return str(error).strip().splitlines()[-1].strip()[:300]


def _cannot_start(error: RayActorError) -> str:
    """One line on a node where the package cannot be imported."""
    found = re.search(r"\bip=([^,)\s]+)", str(error))
    where = f" on node {found[1]}" if found else ""
    return f"a worker cannot start{where}: {_reason(error)}; momentum-tuner must be installed on all nodes alike"
