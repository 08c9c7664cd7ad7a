"""Sharpness of slots: the largest eigenvalue of the training loss's Hessian, by Hessian-vector products."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from momentum_tuner.trainer.data import Batch, TrainingData, count_examples
from momentum_tuner.trainer.lanczos import MOST_PRODUCTS, largest_eigenvalues
from momentum_tuner.trainer.memory import first_line, free_memory, is_out_of_memory
from momentum_tuner.trainer.objective import PARITY_TOLERANCE, Objective
from momentum_tuner.trainer.replay import relative_difference
from momentum_tuner.trainer.state import SlotState

logger = logging.getLogger(__name__)

EXAMPLES = 512
"""Training examples of the batch on which the sharpness is measured."""
EXAMPLES_AT_ONCE = 4096
"""Examples, over slots, that a product goes through at once: as many as a training step of 64 slots of 64."""


class Sharpness:
    """Measures the sharpness of slots on one batch, fused where that works.

    A trial does without it rather than fail: what goes wrong here is logged, the first time, and leaves a value out.

    Args:
        objective: the loss.
        data: its first `EXAMPLES` are the batch, or the first batch of an iterable.
    """

    def __init__(self, objective: Objective, data: TrainingData) -> None:
        self._objective = objective
        self._data = data
        self._batch: Batch | None = None
        self._fused = objective.batch_slots
        self._checked = False
        self._most = 1
        self._said: set[str] = set()

    @property
    def at_once(self) -> int:
        """Slots that are measured together."""
        return self._most if self._fused else 1

    def measure(self, states: Sequence[SlotState], pause: Callable[[], bool]) -> list[float | None]:
        """The largest Hessian eigenvalue at each state, None where it cannot be had; after a pause the first few.

        Args:
            states: on the device.
            pause: asked before each product, whether to stop there.
        """
        found: list[float | None] = []
        while len(found) < len(states):
            rest = states[len(found) :]
            try:
                values = self._eigenvalues(rest, pause)
            except Exception as error:
                no_memory, reason = is_out_of_memory(error), first_line(error)
            else:
                if values is None:
                    break
                found += values
                continue
            # Not in the handler, where the error would keep its frames alive, and all the tensors in them.
            slots = min(self.at_once, len(rest))
            if no_memory:
                free_memory()
            if no_memory and slots > 1:
                self._most = slots // 2
            elif slots > 1:
                logger.info("sharpness is measured one slot at a time: %s", reason)
                self._fused = False
            else:
                self._leave_out(reason)
                found.append(None)
        return found

    def _eigenvalues(self, rest: Sequence[SlotState], pause: Callable[[], bool]) -> list[float | None] | None:
        """Values of the first states, as many as go at once; None after a pause."""
        if self._batch is None:
            self._batch = self._data.sample(EXAMPLES)
            self._most = max(1, EXAMPLES_AT_ONCE // count_examples(self._batch.tensors))
        some = rest[: self.at_once]
        fused = len(some) > 1  # a slot alone takes less time without vmap
        multiply = hessian(self._objective, some, self._batch, fused)
        rows = some[0].tensors["parameters"].expand(len(some), -1)
        if fused and not self._checked:
            self._check(multiply, rows, some[0], self._batch)
        values = largest_eigenvalues(multiply, rows, pause)
        if values is None:
            return None
        if not all(map(math.isfinite, values)):
            self._leave_out(f"it is not finite, or was not found by {MOST_PRODUCTS} Hessian-vector products")
        return [value if math.isfinite(value) else None for value in values.tolist()]

    def _check(self, multiply: Callable[[Tensor], Tensor], rows: Tensor, first: SlotState, batch: Batch) -> None:
        """See that fused products are those of a slot alone, as not every derivative of a derivative is right.

        Raises:
            ArithmeticError: they are not.
        """
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64).to(rows)
        fused = multiply(vector.expand(len(rows), -1))[0]
        solo = hessian(self._objective, [first], batch, fused=False)(vector[None])[0]
        difference = relative_difference(fused, solo)
        if difference > PARITY_TOLERANCE:
            raise ArithmeticError(f"the fused Hessian differs from the solo one by {difference:.1%}")
        self._checked = True

    def _leave_out(self, reason: str) -> None:
        if reason not in self._said:
            logger.warning("a trial has no sharpness: %s", reason)
            self._said.add(reason)


def hessian(objective: Objective, states: Sequence[SlotState], batch: Batch, fused: bool) -> Callable[[Tensor], Tensor]:
    """The Hessians of the loss at some states, as a function of vectors `[slots, parameters]` that multiplies them.

    The gradient's own graph is kept and gone through backwards for each product: reverse over reverse. That takes half
    the time of forward over reverse, which computes the gradient anew every time.

    Args:
        objective: the loss.
        states: where.
        batch: shared by all slots.
        fused: all slots at once or one after the other.
    """
    prefix = "buffer/"
    point = torch.stack([state.tensors["parameters"] for state in states]).requires_grad_()
    buffers = {
        name.removeprefix(prefix): torch.stack([state.tensors[name] for state in states])
        for name in states[0].tensors
        if name.startswith(prefix)
    }
    with torch.enable_grad():
        loss = objective.smooth_loss(point, buffers, batch, fused)
        (gradient,) = torch.autograd.grad(loss.sum(), point, create_graph=True)

    def multiply(vectors: Tensor) -> Tensor:
        if not gradient.requires_grad:  # the loss is linear
            return torch.zeros_like(vectors)
        # `torch.autograd.grad` passes over what forbids a second derivative where that does not lead to the point.
        torch.autograd.backward(gradient, vectors, retain_graph=True)
        product, point.grad = point.grad, None
        return torch.zeros_like(vectors) if product is None else product

    return multiply
