"""`Loop`, a training loop of the user's own, and the context in which it runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from momentum_tuner.catalog import OPTIMIZERS
from momentum_tuner.errors import TaskError
from momentum_tuner.optim import Schedule
from momentum_tuner.tasks.packing import pack, unpack

ScheduleOf = Callable[[int], Schedule]
"""The study's schedule, for a loop that takes so many optimizer steps in an epoch."""
Packed = tuple[Mapping[str, Tensor], Any]
"""A loop's state: its tensors by name, and the rest as plain JSON values."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Loop:
    """A training loop of the user's own, where a `Task` does not fit: GANs, reinforcement learning, several GPUs.

    Its trials run one epoch at a time and one trial after the other, with the same tickets, pruning and verdict.

    Attributes:
        train: a generator function of one argument, the `LoopContext`. It yields its measures as a mapping once
            before training, of the model as it stands, and once after each epoch. In every one there are
            `valid_loss` and, for each of `metrics`, `valid_<metric>`; there may be `train_loss`, `grad_norm`,
            `grad_norm_max`, `layer_grad_ratio`, `update_norm`, `oscillation` and `spikes` of the epoch, and `step`,
            the optimizer steps so far, where `LoopContext.optimizer` does not count them. A trial is diverged
            whose `valid_loss` or `train_loss` is not finite, or whose `valid_loss` is above ten times that of
            the untrained model; so the loss should not begin at zero.
        metrics: names of further measures that it yields, without `valid_`.

    Raises:
        TaskError: in one line, what is wrong with a field and what it should be.
    """

    train: Callable[[LoopContext], Iterator[Mapping[str, float]]]
    metrics: Sequence[str] = ()

    def __post_init__(self) -> None:
        if inspect.isgenerator(self.train):
            raise TaskError("Loop.train is a generator that runs already: give the function, train=train")
        if not callable(self.train):
            raise TaskError(f"Loop.train must be a generator function, not {type(self.train).__name__}")
        if not _takes_one_argument(self.train):
            raise TaskError("Loop.train must take one argument, the context: def train(context)")
        if isinstance(self.metrics, str) or not isinstance(self.metrics, Sequence):
            raise TaskError(f"Loop.metrics must be a list of names, not {type(self.metrics).__name__}")
        for name in self.metrics:
            if not isinstance(name, str) or not name.isidentifier():
                raise TaskError(f"Loop.metrics: {name!r} is not a name; use letters, digits and underscores")
            if name == "loss" or name.startswith("valid_"):
                raise TaskError(f"Loop.metrics: {name!r} is taken or has a prefix; name it without valid_")
        object.__setattr__(self, "metrics", tuple(dict.fromkeys(self.metrics)))


def _takes_one_argument(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:  # it has no signature to look at
        return True
    return True


class LoopContext:
    """What a loop knows of its trial, and where it keeps its state.

    While the loop runs, the random generators of torch, NumPy and Python are the trial's own: before the first yield
    they follow from its seed, in each epoch from its seed and the epoch. So another trial in the same process does
    not disturb it, and an epoch after `load` is the same as one that was never interrupted.

    Attributes:
        optimizer_name: a name of `catalog.OPTIMIZERS`.
        settings: `learning_rate`, `momentum`, `batch_size` and whatever else the optimizer and the study file have.
        seed: of the trial; fixes the initial weights and the order of the data.
        device: where to train.
        epochs: the whole budget.
        epoch: how many of them are done: 0 for a new trial, more for one that goes on.
    """

    def __init__(
        self,
        optimizer_name: str,
        settings: Mapping[str, float],
        seed: int,
        device: torch.device,
        epochs: int,
        schedule_of: ScheduleOf | None = None,
    ) -> None:
        self.optimizer_name = optimizer_name
        self.settings = MappingProxyType(dict(settings))
        self.seed = seed
        self.device = device
        self.epochs = epochs
        self.epoch = 0
        self.loaded = False
        self._schedule_of = schedule_of
        self._to_load: Packed | None = None
        self._saved: Packed | None = None
        self._counters: list[_Steps] = []
        self._steps_before: Sequence[int] = ()

    def begin(self, epoch: int, state: Packed | None) -> None:
        """Set where the trial goes on: for the trainer."""
        self.epoch, self._to_load = epoch, state

    def forget(self) -> None:
        """Let go of what was saved before the first yield: the trial begins in that state anyway. For the trainer."""
        self._saved = None

    def take(self) -> Packed | None:
        """What the loop saved since it was taken last, and one epoch more is done: for the trainer."""
        self.epoch += 1
        saved, self._saved = self._saved, None
        return saved

    @property
    def steps(self) -> list[int]:
        """Steps so far of each optimizer that the context built, in the order in which it did."""
        return [counter.taken for counter in self._counters]

    def optimizer(
        self, parameters: Iterable[Tensor] | Iterable[dict[str, Any]], steps_per_epoch: int | None = None
    ) -> torch.optim.Optimizer:
        """An optimizer of torch.optim with the trial's settings; each of its steps clips and schedules as they say.

        Args:
            parameters: what torch.optim takes.
            steps_per_epoch: how many steps the loop takes with it in an epoch; needed where the study has a schedule.

        Raises:
            TaskError: torch.optim has no such optimizer, or `steps_per_epoch` is missing.
        """
        schedule = None
        if self._schedule_of is not None:
            if steps_per_epoch is None:
                raise TaskError(
                    "the study has a schedule, so the loop must say how many steps it takes in an epoch: "
                    "context.optimizer(parameters, steps_per_epoch=...)"
                )
            schedule = self._schedule_of(steps_per_epoch)
        built = torch_optimizer(self.optimizer_name, self.settings, parameters)
        number = len(self._counters)
        taken = self._steps_before[number] if number < len(self._steps_before) else 0
        self._counters.append(_Steps(built, schedule, self.settings.get("clip_norm", math.inf), taken))
        return built

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep the state after the epoch whose measures are yielded next; it takes the place of the one before.

        Before the first yield, where no epoch was trained yet, nothing is kept.
        It is written to a checkpoint every 30 seconds, and when the worker is asked to stop. A trial that another
        worker takes over goes on from the one written last; without any it begins anew.

        Args:
            state: such as `{"model": model.state_dict(), "optimizer": optimizer.state_dict()}`: tensors, which are
                copied, numbers and texts, in mappings, lists and tuples.

        Raises:
            TypeError: something else is in it.
        """
        tensors, packed = pack(state)
        self._saved = tensors, {"state": packed, "steps": self.steps}

    def load(self) -> dict[str, Any] | None:
        """The state that was saved after `epoch` epochs, with its tensors on the CPU; None for a new trial.

        It also tells the optimizers that are built afterwards how many steps they have taken.
        """
        self.loaded = True
        if self._to_load is None:
            return None
        tensors, packed = self._to_load
        match packed:
            case {"state": state, "steps": [*steps]} if all(isinstance(taken, int) for taken in steps):
                for counter, taken in zip(self._counters, steps, strict=False):
                    counter.taken = taken
                self._steps_before = steps
                return unpack(tensors, state)
        raise ValueError("the saved state is not one of a loop")


class _Steps:
    """Counts an optimizer's steps and, before each, clips the gradient and sets what the schedule says."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, schedule: Schedule | None, clip_norm: float, taken: int
    ) -> None:
        self.taken = taken
        self._schedule = schedule
        self._clip_norm = clip_norm
        self._groups: list[dict[str, Any]] = []
        self._take_in_groups(optimizer)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_load_state_dict_pre_hook(self._take_in_groups)

    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `step` is called with: with a closure that clips, where it takes one, as that computes the gradient."""
        if math.isfinite(self._clip_norm):
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            if closure is None:
                self._clip(optimizer)
            else:
                args, kwargs = args[:1], {**kwargs, "closure": partial(self._close, optimizer, closure)}
        if self._schedule is not None:
            self._take_in_groups(optimizer)
            at = np.array(self.taken)
            rate = float(self._schedule.learning_rate_factor(at))
            cycle = float(self._schedule.momentum_factor(at))
            for group, own in zip(optimizer.param_groups, self._groups, strict=True):
                group["lr"] = own["lr"] * rate
                if "momentum" in own:
                    group["momentum"] = own["momentum"] * cycle
                if "betas" in own:
                    group["betas"] = (own["betas"][0] * cycle, own["betas"][1])
        self.taken += 1
        return args, kwargs

    def _close(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Any:
        loss = closure()
        self._clip(optimizer)
        return loss

    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], self._clip_norm)

    def _take_in_groups(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Remember what the groups that were added since have of their own, before a schedule or a state changes it."""
        self._groups += [{**group} for group in optimizer.param_groups[len(self._groups) :]]


def torch_optimizer(
    name: str, settings: Mapping[str, float], parameters: Iterable[Tensor] | Iterable[dict[str, Any]]
) -> torch.optim.Optimizer:
    """The optimizer of torch.optim that equals an optimizer of the catalog; `clip_norm` is not part of it.

    Args:
        name: of `catalog.OPTIMIZERS`.
        settings: its hyperparameters by name.
        parameters: what torch.optim takes.

    Raises:
        TaskError: torch.optim has none that is equal.
    """
    torch_class = OPTIMIZERS[name].torch_class
    if torch_class is None:
        raise TaskError(
            f"{name} is not in torch.optim, so context.optimizer cannot build it: leave it out of `optimizers`, "
            "or build it in the loop from context.settings"
        )
    arguments: dict[str, Any] = {"lr": settings["learning_rate"]}
    arguments |= {k: settings[k] for k in ("momentum", "dampening", "alpha", "eps", "weight_decay") if k in settings}
    if settings.get("nesterov") and arguments["momentum"]:  # torch refuses it without momentum, where it is nothing
        arguments["nesterov"] = True
    if "beta1" in settings:
        arguments["betas"] = (settings["beta1"], settings["beta2"])
    built: torch.optim.Optimizer = getattr(torch.optim, torch_class)(parameters, **arguments)
    return built
