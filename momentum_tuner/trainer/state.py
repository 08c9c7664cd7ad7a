"""One trial's settings and state: what goes from trainer to trainer, and how it is checked on arrival."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from momentum_tuner.catalog import OPTIMIZERS
from momentum_tuner.metrics import SpikeState
from momentum_tuner.optim import RULES, Rule
from momentum_tuner.trainer.objective import Objective

TABLE_COLUMNS = 5
"""Measures of a step: those of `metrics.StepTable`."""

_LARGEST = 2**53  # the last up to which JSON, float64 and int64 agree
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True)
class TrialSettings:
    """What one trial trains with.

    Attributes:
        optimizer: a name of `catalog.OPTIMIZERS`.
        hyperparameters: `learning_rate`, `momentum`, ... by name; those missing are at their neutral value.
        batch_size: examples per step (of no effect for iterables and landscapes).
        seed: fixes the initial weights and the data order.
    """

    optimizer: str
    hyperparameters: Mapping[str, float]
    batch_size: int
    seed: int

    @property
    def rule(self) -> Rule:
        """The update rule that trains it."""
        return RULES[OPTIMIZERS[self.optimizer].rule]

    def value(self, name: str) -> float:
        """A hyperparameter's value, 0 (or infinity, for `clip_norm`) where nothing sets it."""
        constants = OPTIMIZERS[self.optimizer].constants
        neutral = float("inf") if name == "clip_norm" else 0.0
        return float(constants.get(name, self.hyperparameters.get(name, neutral)))

    @property
    def penalty(self) -> float:
        """Curvature of the L2 penalty that its gradient includes: none where weight decay is decoupled from it."""
        return 0.0 if self.rule.name == "adamw" else self.value("weight_decay")


@dataclass(frozen=True)
class SlotState:
    """All of one slot's state after a step: what another worker needs to go on with the trial.

    Attributes:
        tensors: `parameters`, `previous_update` and `moment/<name>`, each `[parameters]`, and `buffer/<name>`; in
            the middle of an epoch also `part/table` `[epoch_steps, 5]`, the measures of its steps, `part/limit` `[]`,
            the loss above which the trial is diverged, and `part/taken` `[]`, its steps before it diverged.
        epoch: epochs done.
        step: optimizer steps done in them.
        initial_loss: loss of the first minibatch before any update; None before the first epoch is done.
        spikes: the trailing means of the loss after those epochs.
        epoch_steps: steps done of the epoch after them; all of its steps if it only has to be evaluated.
        seconds: what those steps took.
        loop: what a loop of the user's own saved besides its tensors, as plain JSON values.
    """

    tensors: Mapping[str, Tensor]
    epoch: int = 0
    step: int = 0
    initial_loss: float | None = None
    spikes: SpikeState = field(default_factory=SpikeState)
    epoch_steps: int = 0
    seconds: float = 0.0
    loop: Any = None

    def header(self) -> dict[str, Any]:
        """All but the tensors, as plain JSON values; `restore` makes the state of it again, to the last bit."""
        loop = {} if self.loop is None else {"loop": self.loop}
        return loop | {
            "epoch": self.epoch,
            "step": self.step,
            "epoch_steps": self.epoch_steps,
            "initial_loss": None if self.initial_loss is None else _plain(self.initial_loss),
            "seconds": _plain(self.seconds),
            "spikes": {f.name: _plain(getattr(self.spikes, f.name)) for f in fields(SpikeState)},
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> SlotState:
        """The state of its tensors and its `header`, in which further fields are left alone.

        Raises:
            ValueError: a field is missing or has no possible value. Whether the tensors fit, `admit` sees.
        """
        if not isinstance(header, Mapping):
            raise ValueError(f"the state's header is not an object but {_kind(header)}")
        epoch, step, epoch_steps = (_whole(header, name) for name in ("epoch", "step", "epoch_steps"))
        initial_loss = None if _value(header, "initial_loss") is None else _number(header, "initial_loss")
        if epoch > 0 and initial_loss is None:
            raise ValueError(f"the state's header has no initial_loss after {epoch} epochs")
        seconds = _number(header, "seconds")
        if not 0.0 <= seconds < math.inf:
            raise ValueError(f"the state's header says that seconds is {seconds}")
        spikes = _value(header, "spikes")
        if not isinstance(spikes, Mapping):
            raise ValueError(f"the state's header has {_kind(spikes)} for spikes")
        trailing = SpikeState(**{f.name: _number(spikes, f.name) for f in fields(SpikeState)})
        if trailing.weight < 0 or trailing.deviation_weight < 0 or trailing.deviation < 0:
            raise ValueError("the state's header has a negative weight or deviation in spikes")
        return cls(dict(tensors), epoch, step, initial_loss, trailing, epoch_steps, seconds, header.get("loop"))


def check_state(objective: Objective, settings: TrialSettings, state: SlotState, steps: int) -> None:
    """See that a slot can go on from a state.

    Args:
        objective: the model's.
        settings: the trial's.
        state: what it would go on from.
        steps: of an epoch.

    Raises:
        ValueError: its tensors are not those of this model and update rule, or do not fit its `epoch_steps`.
    """
    if not 0 <= state.epoch_steps <= steps:
        raise ValueError(f"the state has {state.epoch_steps} steps of an epoch of {steps}")
    expected = _expected_tensors(objective, settings.rule, state.epoch_steps)
    if odd := sorted(set(expected) ^ set(state.tensors)):
        raise ValueError(f"the state {'lacks' if odd[0] in expected else 'has an unknown'} tensor {odd[0]!r}")
    for name, (shape, dtype) in expected.items():
        found = state.tensors[name]
        if not isinstance(found, Tensor):
            raise ValueError(f"the state has {_kind(found)} for tensor {name!r}")
        if found.shape != shape or found.dtype != dtype:
            has = f"{found.dtype} {list(found.shape)}"
            raise ValueError(f"the state's tensor {name!r} is {has} where {dtype} {list(shape)} was expected")
    if state.epoch_steps:
        taken = float(state.tensors["part/taken"])
        if not 0 <= taken <= state.epoch_steps or not taken.is_integer():
            raise ValueError(f"the state has {taken} steps taken of {state.epoch_steps}")
        if not bool(state.tensors["part/table"][: int(taken), 0].isfinite().all()):
            raise ValueError("the state has a loss that is not finite before it diverged")


def _expected_tensors(objective: Objective, rule: Rule, epoch_steps: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype by name of a state's tensors."""
    dtype = objective.layout.dtype
    row = (torch.Size([objective.layout.parameters]), dtype)
    expected = dict.fromkeys(["parameters", *(f"moment/{name}" for name in rule.moments)], row)
    expected["previous_update"] = (row[0], table_dtype(dtype))
    expected |= {f"buffer/{name}": kind for name, kind in objective.own.items()}
    if epoch_steps:
        table = torch.Size([epoch_steps, TABLE_COLUMNS])
        expected |= {
            "part/table": (table, table_dtype(dtype)),
            "part/limit": (torch.Size([]), table_dtype(dtype)),
            "part/taken": (torch.Size([]), table_dtype(dtype)),
        }
    return expected


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of measures, updates and hyperparameters beside parameters of this one.

    A bfloat16 cannot count to an epoch's steps, nor tell 0.999 from 1.
    """
    return torch.promote_types(dtype, torch.float32)


def new_state(objective: Objective, settings: TrialSettings) -> SlotState:
    """The state of a trial before its first step."""
    start = objective.start(settings.seed)
    previous = torch.zeros_like(start.row, dtype=table_dtype(start.row.dtype))
    tensors = {"parameters": start.row, "previous_update": previous}
    tensors |= {f"moment/{name}": torch.zeros_like(start.row) for name in settings.rule.moments}
    tensors |= {f"buffer/{name}": value for name, value in start.buffers.items()}
    return SlotState(tensors)


def _plain(value: float) -> float | str:
    """A float for JSON, which has no word for those that are not finite."""
    return value if math.isfinite(value) else repr(value)


def _value(header: Mapping[str, Any], name: str) -> Any:
    if name not in header:
        raise ValueError(f"the state's header has no {name}")
    return header[name]


def _whole(header: Mapping[str, Any], name: str) -> int:
    """A whole number from 0 on."""
    value = _value(header, name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"the state's header has {_kind(value)} for {name}")
    if not 0 <= value <= _LARGEST:
        raise ValueError(f"the state's header has a {name} that is negative or huge")
    return value


def _number(header: Mapping[str, Any], name: str) -> float:
    """A float, as `_plain` wrote it."""
    value = _value(header, name)
    if isinstance(value, str) and value in _NOT_FINITE:
        return _NOT_FINITE[value]
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return float(value)
    raise ValueError(f"the state's header has {_kind(value)} for {name}")


def _kind(value: Any) -> str:
    """A value's type, with the value itself where that is short."""
    shown = repr(value) if isinstance(value, bool | float | None) else ""
    return f"{type(value).__name__} {shown}".strip()
