"""Landscapes: functions of the parameters alone, in float64, with a minimum that is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from momentum_tuner.errors import TaskError
from momentum_tuner.tasks.task import Task, checked

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Jitter = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Point(nn.Module):
    """A point of the landscape: one parameter vector `[dim]`, whose loss is the module's output."""

    def __init__(self, start: Tensor, jitter: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(start + jitter * torch.randn_like(start))


class _Quadratic(_Point):
    eigenvalues: Tensor

    def __init__(self, start: Tensor, jitter: float, eigenvalues: Tensor) -> None:
        super().__init__(start, jitter)
        self.register_buffer("eigenvalues", eigenvalues.clone())

    def forward(self) -> Tensor:
        return 0.5 * (self.eigenvalues * self.theta.square()).sum()


class _Rosenbrock(_Point):
    def forward(self) -> Tensor:
        x, y = self.theta[:-1], self.theta[1:]
        return (100 * (y - x.square()).square() + (1 - x).square()).sum()


class _DoubleWell(_Point):
    def __init__(self, start: Tensor, jitter: float, deep: float, scale: float) -> None:
        super().__init__(start, jitter)
        self.deep = deep
        self.scale = scale

    def forward(self) -> Tensor:
        # The quartic with slope scale * (x + 1) x (x - deep), around its double root x = deep.
        x, b = self.theta, self.deep
        quartic = (x - b).square() * (3 * x.square() + (2 * b + 4) * x + b * (b + 2))
        return (self.scale / 12 * quartic).sum()


def _landscape(model: Callable[[], nn.Module], optimum: Tensor, steps_per_epoch: int) -> Task:
    return Task(model=model, loss=_height, steps_per_epoch=steps_per_epoch, optimum=optimum)


def _height(model: nn.Module, batch: Any) -> Tensor:
    height: Tensor = model()
    return height


@checked
def quadratic(
    dim: Count = 20,
    kappa: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 100.0,
    smallest: Positive = 1.0,
    spectrum: Literal["log", "linear", "ends"] = "log",
    start: Literal["ones", "random"] = "ones",
    steps_per_epoch: Count = 50,
) -> Task:
    """A quadratic bowl, `0.5 * sum(eigenvalues * theta^2)`: where the best settings are known in closed form.

    Args:
        dim: parameters, `theta` of shape [dim].
        kappa: condition number, the largest eigenvalue over the smallest.
        smallest: the smallest eigenvalue.
        spectrum: eigenvalues spaced evenly on a log or on a linear scale, or half at each of the two ends.
        start: `ones / sqrt(dim)`, which excites all modes alike, or normal with that scale, drawn under the
            trial's seed.
        steps_per_epoch: optimizer steps in an epoch.

    Returns:
        the landscape, with its optimum at zero.

    Raises:
        TaskError: an option is not allowed.

    Source: Lessard, Recht and Packard 2016, "Analysis and design of optimization algorithms via integral
    quadratic constraints", for the best settings and their rates.
    """
    if dim == 1 and kappa != 1:
        raise TaskError(f"dim: kappa {kappa:g} needs two different eigenvalues, so dim should be 2 or more")
    eigenvalues = _eigenvalues(dim, smallest, kappa * smallest, spectrum)
    scale = dim**-0.5
    center = torch.full((dim,), scale if start == "ones" else 0.0, dtype=torch.float64)
    jitter = scale if start == "random" else 0.0
    return _landscape(
        lambda: _Quadratic(center, jitter, eigenvalues),
        torch.zeros(dim, dtype=torch.float64),
        steps_per_epoch,
    )


def _eigenvalues(dim: int, smallest: float, largest: float, spectrum: str) -> Tensor:
    share = torch.linspace(0, 1, dim, dtype=torch.float64)
    if spectrum == "log":
        eigenvalues = smallest * (largest / smallest) ** share
    elif spectrum == "linear":
        eigenvalues = smallest + (largest - smallest) * share
    else:
        eigenvalues = torch.full_like(share, smallest)
        eigenvalues[share >= 0.5] = largest
    eigenvalues[0] = smallest
    eigenvalues[-1] = largest  # exactly, as the power may round
    return eigenvalues


@checked
def rosenbrock(dim: Annotated[int, Field(ge=2)] = 2, jitter: Jitter = 0.0, steps_per_epoch: Count = 100) -> Task:
    """Rosenbrock's curved valley, `sum 100 (x_{i+1} - x_i^2)^2 + (1 - x_i)^2`, from (-1.2, 1, -1.2, 1, ...).

    Args:
        dim: parameters. From 4 on there is also a local minimum near (-1, 1, ..., 1).
        jitter: standard deviation of a normal shift of the start, drawn under the trial's seed. At 0 every
            seed gives the same trial.
        steps_per_epoch: optimizer steps in an epoch.

    Returns:
        the landscape, with its optimum at (1, ..., 1).

    Raises:
        TaskError: an option is not allowed.

    Source: Rosenbrock 1960, with its start; the chain over more dimensions is that of scipy.optimize.rosen.
    """
    start = torch.ones(dim, dtype=torch.float64)
    start[::2] = -1.2
    return _landscape(lambda: _Rosenbrock(start, jitter), torch.ones(dim, dtype=torch.float64), steps_per_epoch)


@checked
def double_well(
    barrier: Positive = 1.0,
    deep: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.5,
    start: Annotated[float, Field(lt=-1, allow_inf_nan=False)] = -1.6,
    jitter: Jitter = 0.0,
    steps_per_epoch: Count = 50,
) -> Task:
    """A quartic with a shallow minimum at -1, a barrier at 0 and a deeper, sharper minimum at `deep`.

    The start lies beyond the shallow minimum and higher than the barrier, so momentum with little friction
    carries the parameter over. Gradient descent would have to jump the barrier in one step. At the default
    shape the learning rate at which its first step does, `1 / ((-start - 1)(deep - start))`, is so far beyond
    the largest that is stable in the deep minimum, `2 / (deep (1 + deep))`, both in units of one over the slope's
    scale, that it ends there at no learning rate.

    Args:
        barrier: height of the barrier above the shallow minimum.
        deep: where the deep minimum is.
        start: where the parameter starts.
        jitter: standard deviation of a normal shift of the start, drawn under the trial's seed. At 0 every
            seed gives the same trial.
        steps_per_epoch: optimizer steps in an epoch.

    Returns:
        the landscape with one parameter [1], whose optimum is the deep minimum, at loss 0.

    Raises:
        TaskError: an option is not allowed.
    """
    scale = 12 * barrier / (1 + 2 * deep)
    start_at = torch.tensor([start], dtype=torch.float64)
    return _landscape(
        lambda: _DoubleWell(start_at, jitter, deep, scale),
        torch.tensor([deep], dtype=torch.float64),
        steps_per_epoch,
    )
