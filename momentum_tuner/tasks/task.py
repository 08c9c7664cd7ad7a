"""`Task`, what a factory returns, and the check that it can be trained."""

from __future__ import annotations

import functools
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec

import torch
from pydantic import ConfigDict, ValidationError, validate_call
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from momentum_tuner.errors import TaskError
from momentum_tuner.spec import OBJECTIVES
from momentum_tuner.tasks.loop import Loop

Measure = Callable[[nn.Module, Any], Tensor]
"""A loss or a metric: of a model and a batch, a scalar."""

_ROWS_TO_CHECK = 32
_OF_LOOPS = {"valid_loss", "best_valid_loss", "final_valid_loss", "mean_valid_loss", "steps_to_target"}
_STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib")).resolve()
_INSTALLED = tuple({Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")})
_TORCH = Path(torch.__file__).resolve().parent
_OURSELVES = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """What is trained: a model, a loss, and the data, or a landscape without data.

    Attributes:
        model: builds a new model. It is called under the trial's seed, which so fixes the initial weights.
        loss: of (model, batch), the mean over the batch as a scalar. A landscape's batch is None.
        train: tensors in memory, of which each trial draws its own minibatches (tuples of `[batch, ...]`
            tensors); or an iterable of batches that can be iterated anew every epoch, such as a DataLoader,
            which all slots share; or None for a landscape.
        valid: as `train`; given exactly if `train` is.
        metrics: further measures of (model, batch) on the validation set by name, each a mean over the batch.
        steps_per_epoch: optimizer steps in an epoch: needed for a landscape and for a `train` iterable without
            `len()`; with other data it makes an epoch shorter.
        optimum: for a landscape, the known minimum as a vector `[parameters]`, in the order of the model's.

    Raises:
        TaskError: in one line, what is wrong with a field and what it should be.
    """

    model: Callable[[], nn.Module]
    loss: Measure
    train: TensorDataset | Iterable[Any] | None = None
    valid: TensorDataset | Iterable[Any] | None = None
    metrics: Mapping[str, Measure] = field(default_factory=dict)
    steps_per_epoch: int | None = None
    optimum: Tensor | None = None

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module):
            raise TaskError("Task.model is a model, but must build one: write model=lambda: Net(...)")
        for name in ("model", "loss"):
            _check_callable(name, getattr(self, name))
        _check_metrics(self.metrics)
        object.__setattr__(self, "metrics", MappingProxyType(dict(self.metrics)))
        for name in ("train", "valid"):
            if getattr(self, name) is not None:
                _check_data(name, getattr(self, name))
        if self.train is not None and self.valid is None:
            raise TaskError("Task.valid is missing: a task with training data needs validation data")
        if self.train is None and self.valid is not None:
            raise TaskError("Task.train is missing: a task with validation data needs training data")
        _check_steps(self.steps_per_epoch, self.train)
        if self.optimum is not None:
            if self.train is not None:
                raise TaskError("Task.optimum is for a landscape: a task with data has no known optimum")
            _check_optimum(self.optimum)


def _check_callable(name: str, value: object) -> None:
    if not callable(value):
        raise TaskError(f"Task.{name} must be callable, not {type(value).__name__}")


def _check_metrics(metrics: object) -> None:
    if not isinstance(metrics, Mapping):
        raise TaskError(f"Task.metrics must map names to functions, not be {type(metrics).__name__}")
    for name, metric in metrics.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise TaskError(f"Task.metrics: {name!r} is not a name; use letters, digits and underscores")
        if name == "loss":
            raise TaskError("Task.metrics: 'loss' is taken by the loss itself; give the metric another name")
        _check_callable(f"metrics[{name!r}]", metric)


def _check_data(name: str, data: object) -> None:
    where = f"Task.{name}"
    if isinstance(data, TensorDataset):
        if not data.tensors or len(data) == 0:
            raise TaskError(f"{where} is empty")
        return
    if isinstance(data, Tensor):
        raise TaskError(f"{where} is a tensor: wrap it, TensorDataset(x, y)")
    if isinstance(data, tuple) and data and all(isinstance(part, Tensor) for part in data):
        raise TaskError(f"{where} is a tuple of tensors: wrap it, TensorDataset(x, y)")
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise TaskError(f"{where} is a Dataset of single examples: wrap it in a DataLoader")
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        kind = type(data).__name__
        raise TaskError(f"{where} must be a TensorDataset or an iterable of batches, not {kind}")
    if isinstance(data, Iterator):
        raise TaskError(
            f"{where} is a one-shot iterator ({type(data).__name__}), empty after one epoch: "
            "give a list, a DataLoader, or an object whose __iter__ starts anew"
        )
    if length(data) == 0:
        raise TaskError(f"{where} is empty")


def length(data: Any) -> int | None:
    """How many batches or rows there are, if that can be told."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):  # the second from a user's __len__ that is only declared
        return None


def _check_steps(steps: object, train: object) -> None:
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise TaskError(f"Task.steps_per_epoch must be a positive integer, not {steps!r}")
    if train is None:
        if steps is None:
            raise TaskError("Task.steps_per_epoch is missing: a landscape has no data to count an epoch by")
    elif not isinstance(train, TensorDataset):
        batches = length(train)
        if batches is None and steps is None:
            raise TaskError("Task.steps_per_epoch is missing: Task.train has no len() to count an epoch by")
        if batches is not None and steps is not None and steps > batches:
            raise TaskError(f"Task.steps_per_epoch is {steps}, but Task.train has only {batches} batches")


def _check_optimum(optimum: object) -> None:
    if not isinstance(optimum, Tensor) or optimum.ndim != 1 or not optimum.is_floating_point():
        kind = f"shape {list(optimum.shape)}" if isinstance(optimum, Tensor) else type(optimum).__name__
        raise TaskError(f"Task.optimum must be a floating-point tensor [parameters], not {kind}")
    if not bool(torch.isfinite(optimum).all()):
        raise TaskError("Task.optimum has values that are not finite")


def check_task(task: Task | Loop) -> None:
    """Build the model once and run its loss and metrics on one small batch; torch's random state is kept.

    A loop of the user's own is not run: each of its trials shows what is wrong with it.

    Args:
        task: the task as its factory returned it.

    Raises:
        TaskError: in one line, what cannot be trained, or what the user's code raised and where.
    """
    if isinstance(task, Loop):
        return
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        with user_code("Task.model"):
            model: object = task.model()
        if not isinstance(model, nn.Module):
            raise TaskError(f"Task.model must return a torch.nn.Module, not {type(model).__name__}")
        check_parameters(model)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not parameters:
            raise TaskError("Task.model has no trainable parameters")
        _check_gradient(task, model.train(), parameters)
        model.eval()
        with torch.no_grad():
            batch = _first_batch("valid", task.valid)
            _scalar("loss", task.loss, model, batch)
            for name, metric in task.metrics.items():
                _scalar(f"metrics[{name!r}]", metric, model, batch)
    size = sum(parameter.numel() for parameter in parameters)
    if task.optimum is not None and task.optimum.numel() != size:
        raise TaskError(f"Task.optimum has {task.optimum.numel()} values, the model {size} parameters")


def check_parameters(model: nn.Module) -> None:
    """See that a model's parameters have their shapes, and are real.

    Raises:
        TaskError: in one line, which is not, and what to do.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise TaskError(
                f"Task.model: {name} has no shape before the first batch; initialize it in the factory, by calling "
                "the model on an example before it is returned"
            )
        if tensor.requires_grad and tensor.is_complex():
            raise TaskError(
                f"Task.model: {name} is complex, and an optimizer's state is real; make it a real parameter "
                "[..., 2], of which the model takes torch.view_as_complex"
            )


def _check_gradient(task: Task, model: nn.Module, parameters: list[nn.Parameter]) -> None:
    loss = _scalar("loss", task.loss, model, _first_batch("train", task.train))
    if not bool(torch.isfinite(loss)):
        raise TaskError(f"Task.loss is {loss.item()} on the first batch, before any step")
    gradients: tuple[Tensor | None, ...] = ()
    if loss.requires_grad:
        with user_code("the gradient of Task.loss"):
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        raise TaskError("Task.loss does not depend on the model's parameters: it has no gradient")


def _first_batch(name: str, data: TensorDataset | Iterable[Any] | None) -> Any:
    """The first rows of `data` or its first batch; None for a landscape."""
    if data is None:
        return None
    with user_code(f"Task.{name}"):
        if isinstance(data, TensorDataset):
            return data[:_ROWS_TO_CHECK]
        for batch in data:
            return plain_batch(batch)
    raise TaskError(f"Task.{name} yields no batch")


def plain_batch(batch: Any) -> Any:
    """A batch with every mapping as a dict, such as Hugging Face's BatchEncoding: so its tensors can be stacked."""

    def plain(value: Any) -> Any:
        return {name: plain_batch(part) for name, part in value.items()} if isinstance(value, Mapping) else value

    return tree_map(plain, batch)


def _scalar(name: str, measure: Measure, model: nn.Module, batch: Any) -> Tensor:
    with user_code(f"Task.{name}"):
        value: object = measure(model, batch)
    if not isinstance(value, Tensor):
        raise TaskError(f"Task.{name} must return a scalar tensor, not {type(value).__name__}")
    if value.ndim != 0:
        raise TaskError(f"Task.{name} must return a scalar, not shape {list(value.shape)}: return its mean")
    if not value.is_floating_point():
        raise TaskError(f"Task.{name} must return a floating-point scalar, not {value.dtype}")
    return value


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Around a call of the user's code: whatever it raises becomes a `TaskError` of one line.

    Args:
        what: what was called, as the line names it.

    Raises:
        TaskError: the exception's type and message, and file:line of the deepest frame in the user's code.
    """
    try:
        yield
    except TaskError as error:
        raise TaskError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        raise TaskError(f"{what} raised {described(error)}") from error


def described(error: BaseException) -> str:
    """What the user's code raised, in one line, and where."""
    message = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {message} ({_place(error)})" if message else f"{name} ({_place(error)})"


def _place(error: BaseException) -> str:
    """`file:line` of the deepest frame of the user's code, skipping the libraries that it called."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f"{error.filename}:{error.lineno}"
    frames = [
        (Path(frame.filename), f"{frame.filename}:{frame.lineno}")
        for frame in reversed(traceback.extract_tb(error.__traceback__))
        if not frame.filename.startswith("<")
    ]
    not_library = [(path, place) for path, place in frames if not _is_library(path.resolve())]
    # A task that is itself an installed package has no frame outside the installed packages.
    for path, place in not_library:
        if not any(path.resolve().is_relative_to(folder) for folder in _INSTALLED):
            return place
    return (not_library or frames or [(Path(), "unknown place")])[0][1]


def _is_library(path: Path) -> bool:
    if path.is_relative_to(_OURSELVES) or path.is_relative_to(_TORCH):
        return True
    installed = any(path.is_relative_to(folder) for folder in _INSTALLED)
    return path.is_relative_to(_STANDARD_LIBRARY) and not installed


P = ParamSpec("P")


def checked(build: Callable[P, Task]) -> Callable[P, Task]:
    """Decorate a factory, so that its options are checked against their annotations.

    Raises:
        TaskError: the option, what is allowed, and what was given, when the factory is called.
    """
    validated = validate_call(config=ConfigDict(strict=True))(build)

    @functools.wraps(build)
    def factory(*args: P.args, **kwargs: P.kwargs) -> Task:
        try:
            return validated(*args, **kwargs)
        except ValidationError as error:
            mistakes = "; ".join(
                f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg']}, not {mistake['input']!r}"
                for mistake in error.errors(include_url=False)
            )
            raise TaskError(mistakes) from None

    return factory


def check_objective(metric: str, task: Task | Loop) -> None:
    """See that an aim is something the task measures.

    Raises:
        TaskError: it is a metric that the task has not, contraction without a known optimum, or a measure that a
            loop need not yield.
    """
    if metric == "contraction" and (isinstance(task, Loop) or task.optimum is None):
        raise TaskError("objective.metric: contraction needs a task with a known optimum, which this task has not")
    if isinstance(task, Loop) and metric in set(OBJECTIVES) - _OF_LOOPS:
        raise TaskError(f"objective.metric: a Loop need not yield {metric}; use valid_loss or one of Loop.metrics")
    if metric not in OBJECTIVES and metric.removeprefix("valid_") not in task.metrics:
        there = ", ".join(f"valid_{name}" for name in task.metrics) or "none of its own"
        raise TaskError(f"objective.metric: the task has no {metric!r}; its metrics are {there}; or use valid_loss")
