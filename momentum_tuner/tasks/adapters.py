"""Tasks from modules that bring their loss with them: Lightning's training step, or a forward pass with labels.

Neither library is imported: what counts is which methods a module has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from momentum_tuner.errors import TaskError
from momentum_tuner.tasks.task import Task

Data = TensorDataset | Iterable[Any]
_NONE: Mapping[str, Any] = MappingProxyType({})


def from_lightning(
    build_module: Callable[[], nn.Module],
    train: Data,
    valid: Data,
    *,
    valid_loss: str = "val_loss",
    metrics: Mapping[str, str] = _NONE,
) -> Task:
    """A task from a Lightning module: its `training_step` and `validation_step`, without a Trainer.

    The optimizer and schedule are the study's, so `configure_optimizers` is not called, and neither are callbacks and
    `on_...` hooks. What `self.log` is given in a validation step can be a metric; all else that is logged is dropped.

    Args:
        build_module: builds a new module. It is called under the trial's seed, which so fixes the initial weights.
        train: as `Task.train`.
        valid: as `Task.valid`.
        valid_loss: the name under which `validation_step` logs its loss; where it does not, what it returns counts.
        metrics: further measures by their name in the study, and the names under which `validation_step` logs them.

    Raises:
        TaskError: a field is wrong, or, when the task is checked, the module.
    """

    def model() -> nn.Module:
        module = build_module()
        for step in ("training_step", "validation_step"):
            if not callable(getattr(module, step, None)):
                raise TaskError(f"a Lightning module needs a {step}, which {type(module).__name__} has not")
        if not getattr(module, "automatic_optimization", True):
            raise TaskError("a Lightning module with manual optimization has a loop of its own: return a Loop instead")
        log = _Log()
        for name in ("log", "log_dict"):
            object.__setattr__(module, name, getattr(log, name))
        object.__setattr__(module, "_logged", log)
        return module

    def loss(model: Any, batch: Any) -> Tensor:
        returned, logged = _step(model, batch)
        if not model.training and valid_loss in logged:
            return _as_tensor(logged[valid_loss], valid_loss)
        if isinstance(returned, Mapping):
            returned = returned.get("loss")
        if isinstance(returned, Tensor):
            return returned
        if model.training:
            raise TaskError(f"training_step must return the loss, not {type(returned).__name__}")
        raise TaskError(
            f"validation_step neither logs {valid_loss!r} nor returns a loss (it logs {_names(logged)}): "
            "name what it logs its loss as, valid_loss=..."
        )

    def metric(logged_as: str, model: Any, batch: Any) -> Tensor:
        _, logged = _step(model, batch)
        if logged_as not in logged:
            raise TaskError(f"validation_step does not log {logged_as!r}; it logs {_names(logged)}")
        return _as_tensor(logged[logged_as], logged_as)

    measures = {name: partial(metric, logged_as) for name, logged_as in metrics.items()}
    return Task(model=model, loss=loss, train=train, valid=valid, metrics=measures)


class _Log:
    """Takes the place of a module's `log` and `log_dict`, and remembers what comes."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def log(self, name: str, value: Any, *_: Any, **__: Any) -> None:
        self.values[name] = value

    def log_dict(self, dictionary: Mapping[str, Any], *_: Any, **__: Any) -> None:
        self.values.update(dictionary)


def _step(model: Any, batch: Any) -> tuple[Any, Mapping[str, Any]]:
    """What the module's step returns, and what it logs."""
    step = model.training_step if model.training else model.validation_step
    model._logged.values = {}
    returned = step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)
    logged, model._logged.values = model._logged.values, {}
    return returned, logged


def _as_tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.float() if not value.is_floating_point() else value
    if isinstance(value, int | float):
        return torch.tensor(float(value))
    raise TaskError(f"self.log({name!r}) is given a {type(value).__name__}: log a number, such as what it computes")


def _names(logged: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, logged)) or "nothing"


def from_huggingface(
    build_model: Callable[[], nn.Module],
    train: Data,
    valid: Data,
    *,
    columns: Sequence[str] = (),
    metrics: Mapping[str, Callable[[Any, Mapping[str, Any]], Tensor]] = _NONE,
) -> Task:
    """A task from a model of the form of Hugging Face's: `model(**batch)` returns an output that has a `loss`.

    Args:
        build_model: builds a new model. It is called under the trial's seed, which so fixes the initial weights.
        train: as `Task.train`; its batches are mappings, of what the model takes by name.
        valid: the same.
        columns: for batches that are tuples, as those of a `TensorDataset` are: the names of their parts.
        metrics: further measures of the model's output and the batch, a mapping; each a mean over the batch.

    Raises:
        TaskError: a field is wrong, or, when the task is checked, the model.
    """
    for name, data in (("train", train), ("valid", valid)):
        if isinstance(data, TensorDataset) and len(data.tensors) != len(columns):
            raise TaskError(
                f"columns names {len(columns)} parts of a batch, but {name} has {len(data.tensors)} tensors"
            )

    def named(batch: Any) -> Mapping[str, Any]:
        if isinstance(batch, Mapping):
            return batch
        if isinstance(batch, tuple | list) and len(batch) == len(columns):
            return dict(zip(columns, batch, strict=True))
        raise TaskError(
            f"a batch is a {type(batch).__name__}, but the model takes what it needs by name: give batches that are "
            "mappings, or the names of their parts, columns=[...]"
        )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        output = model(**named(batch))
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(found, Tensor):
            raise TaskError(
                f"the model's output, a {type(output).__name__}, has no loss: give it labels in each batch, and let it "
                "return an object or a mapping with a loss"
            )
        return found

    def measure(of: Callable[[Any, Mapping[str, Any]], Tensor], model: nn.Module, batch: Any) -> Tensor:
        inputs = named(batch)
        return of(model(**inputs), inputs)

    measures = {name: partial(measure, of) for name, of in metrics.items()}
    return Task(model=build_model, loss=loss, train=train, valid=valid, metrics=measures)
