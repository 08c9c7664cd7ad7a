"""A task's loss and measures as functions of stacked parameters: over all slots at once, or one slot at a time."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from momentum_tuner.errors import TaskError
from momentum_tuner.tasks import Task
from momentum_tuner.trainer.attributes import check_attributes
from momentum_tuner.trainer.data import Batch, Validation, count_examples, data_dtype, slice_slot
from momentum_tuner.trainer.layout import Layout, Rows, differing, running_statistics, state_beside_parameters
from momentum_tuner.trainer.lowering import Lowering, draws_within
from momentum_tuner.trainer.memory import first_line
from momentum_tuner.trainer.probe import bytes_kept, vmap_warnings
from momentum_tuner.trainer.products import fast_products, rounding, without_libraries
from momentum_tuner.trainer.randomness import RandomStream, mix_seed
from momentum_tuner.trainer.replay import Replay, relative_difference
from momentum_tuner.trainer.wrapper import Wrapper

logger = logging.getLogger(__name__)

GRADIENT, EVALUATION = "gradient", "evaluation"
"""The fused functions by name, as `Replay` knows them."""
PARITY_TOLERANCE = 1e-2
"""Relative difference of a fused gradient from a solo one above which a model is not trusted to vmap."""


@dataclass(frozen=True)
class Start:
    """An untrained model: its row of parameters `[parameters]` and its own (not shared) buffers."""

    row: Tensor
    buffers: dict[str, Tensor]


class Objective:
    """The loss of a task over slots, its gradient, and its evaluation.

    `batch_slots` says whether slots train fused; where they cannot, `reason` says why.

    Args:
        task: model factory, loss and metrics.
        device: where the model lives.
        precision: `auto` (the model's own dtype), `float32`, `float64`, `tfloat32` (float32, whose products CUDA may
            round), or `bfloat16` (autocast).
        probe: a training batch, to see whether vmap can batch the model.
        mode: `fused`, `sequential`, or `auto` (fused where the probe allows it).
    """

    def __init__(self, task: Task, device: torch.device, precision: str, probe: Batch, mode: str = "auto") -> None:
        self.task = task
        self.device = device
        self.precision = precision
        self.autocast = precision == "bfloat16"
        self._dtype = data_dtype(precision)
        self.validation = Validation(task, device, self._dtype)
        with RandomStream(0):
            model = self._build()
        self._draws_within = draws_within(model)
        self.wrapper = Wrapper(model, task)
        self._keys = tuple(f"model.{name}" for name in self.wrapper.key_names)
        self._lowering = Lowering(self.wrapper.calls.drop)
        self._lowering_of_dropout = Lowering(self.wrapper.calls.drop, all_of_them=False)
        self.replay = Replay(self.wrapper)
        self.layout = Layout.of(model)
        self._frozen = [f"model.{name}" for name, p in model.named_parameters() if not p.requires_grad]
        first = self._start(0)
        self.shared: dict[str, Tensor] = {}
        """Buffers and frozen parameters that are alike for every seed and never change: held once, not per slot."""
        self.wrapper.to(self.device)
        self._check_attributes(first, probe)
        if self.validation.divisible:
            self._fit_validation(first, probe)
        self.shared = self._find_shared(first, probe)
        self._versions = self._shared_versions()
        self.own = {n: (b.shape, b.dtype) for n, b in first.buffers.items() if n not in self.shared}
        """Shape and dtype of the buffers that each slot has of its own."""
        self._asks_for_gradients = False
        """Whether the loss in evaluation depends on which tensors say that they require a gradient."""
        self._recurrent = any(isinstance(layer, nn.RNNBase) for layer in model.modules())
        self.reason: str | None = "asked for"
        if mode != "sequential":
            why = self._why_not_fused(probe)
            self.reason = why if mode == "auto" else None
        self.batch_slots = self.reason is None

    @property
    def draws(self) -> bool:
        """Whether fused slots need keys, as the model draws random numbers."""
        return bool(self._keys) or self._draws_within

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the evaluation's columns: the loss, then the task's metrics."""
        return ("loss", *self.task.metrics)

    def start(self, seed: int) -> Start:
        """The untrained model under a seed."""
        start = self._start(seed)
        own = {name: value for name, value in start.buffers.items() if name not in self.shared}
        return Start(start.row, own)

    def train_one_by_one(self, reason: str) -> None:
        """Give up fusing the slots, for this reason."""
        self.reason, self.batch_slots = reason, False

    def gradient(
        self,
        rows: Rows,
        buffers: dict[str, Tensor],
        batch: Batch,
        keys: Tensor | None,
        fused: bool | None = None,
    ) -> tuple[Rows, Tensor]:
        """Gradient and loss `[slots]` at `rows`; buffers `[slots, ...]` are updated in place.

        Args:
            rows: the parameters.
            buffers: the slots' own buffers by name.
            batch: one minibatch for all slots, or one each.
            keys: `[slots]` int64, what the slots' random numbers follow from, or None if the model draws none.
            fused: all slots at once or one after the other, whatever `batch_slots` says.
        """
        if not (self.batch_slots if fused is None else fused) or batch.separate:
            with rounding(self.device, self.precision):
                return self._gradient_one_by_one(rows, buffers, batch, keys)
        arguments = (rows, True), (buffers, True), (batch.tensors, not batch.shared), (keys, True)
        with torch.no_grad(), fast_products(self.device, self.layout.dtype), rounding(self.device, self.precision):
            found = self.replay.call(GRADIENT, partial(self._fused_gradient, batch.shared), *arguments)
        grads, (loss, *after) = tuple(found[: len(rows)]), found[len(rows) :]
        for name, value in zip(buffers, after, strict=True):
            if value is not buffers[name]:
                buffers[name].copy_(value)
        return grads, loss

    def evaluate(self, rows: Rows, buffers: dict[str, Tensor], data: Batch, part: int = 0) -> Tensor:
        """Loss and metrics `[slots, 1 + metrics]` at `rows` on one batch that all slots share, in eval mode.

        Args:
            rows: the parameters.
            buffers: the slots' own buffers by name; left unchanged.
            data: the batch.
            part: its number in the validation set; a model that draws random numbers draws the same ones for it
                every time.
        """
        if not self.batch_slots:
            with rounding(self.device, self.precision):
                return self._evaluate_one_by_one(rows, buffers, data, part)
        arguments = (rows, True), (buffers, True), (data.tensors, False)
        with torch.no_grad(), fast_products(self.device, self.layout.dtype), rounding(self.device, self.precision):
            return self.replay.call(EVALUATION, self._fused_evaluation, *arguments)[0]

    def smooth_loss(self, rows: Tensor, buffers: dict[str, Tensor], data: Batch, fused: bool) -> Tensor:
        """The training loss `[slots]` at `rows` on one batch that all slots share, to be differentiated twice.

        Without dropout and autocast, whose noise and rounding are no part of the landscape. Batch norm normalizes by
        the batch, as it does where the optimizer takes its steps.

        Args:
            rows: `[slots, parameters]`.
            buffers: copies of the slots' own buffers by name, which batch norm writes to.
            data: the batch.
            fused: all slots at once or one after the other.
        """
        self.wrapper.calm()

        def one(row: Tensor, own: dict[str, Tensor]) -> Tensor:
            return self._call(self.layout.views(self.layout.split(row)), own, data.tensors, None, smooth=True)[0]

        def taken_apart(row: Tensor, own: dict[str, Tensor]) -> Tensor:
            # Inside a differentiation torch takes RNN, LSTM and GRU apart into operations that vmap can batch.
            loss: Tensor = vjp(lambda row: one(row, own), row)[0]
            return loss

        # Neither the fast kernels of attention nor the libraries' recurrent layers have a second derivative.
        with sdpa_kernel(SDPBackend.MATH), without_libraries(self._recurrent), torch.enable_grad():
            if fused:
                losses: Tensor = vmap(taken_apart, randomness="error")(rows, buffers)
                return losses
            found = []
            with RandomStream(0) as stream:
                for slot in range(len(rows)):
                    stream.reseed(0)
                    found.append(one(rows[slot], {name: value[slot] for name, value in buffers.items()}))
        return torch.stack(found)

    def check_shared(self) -> None:
        """See that nothing has written to what all slots share.

        Raises:
            TaskError: a buffer changed that had not changed in the first step.
        """
        changed = [name for name, version in self._shared_versions().items() if version != self._versions[name]]
        if changed:
            raise TaskError(_late_change(changed[0]))

    def _shared_versions(self) -> dict[str, int]:
        return {name: value._version for name, value in self.shared.items()}

    def _build(self) -> nn.Module:
        model, dtype = self.task.model(), self._dtype
        if dtype is None:
            return model

        def cast(tensor: Tensor) -> Tensor:  # unlike `to`, which takes the real part of complex buffers
            to = dtype.to_complex() if tensor.is_complex() else dtype
            return tensor.to(to) if tensor.is_complex() or tensor.is_floating_point() else tensor

        model._apply(cast)  # type: ignore[no-untyped-call]
        return model

    def _start(self, seed: int) -> Start:
        with RandomStream(seed):
            model = self._build()
        buffers = {f"model.{n}": b.detach().clone().to(self.device) for n, b in state_beside_parameters(model).items()}
        return Start(self.layout.flatten(model).to(self.device), buffers)

    def _first_step(self, start: Start, probe: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a training step, and the buffers after it."""
        self.wrapper.train()
        buffers = {name: value.clone() for name, value in start.buffers.items()}
        with RandomStream(0), torch.enable_grad():
            return self._call(self.layout.views(self.layout.split(start.row)), buffers, slice_slot(probe, 0), None)

    def _check_attributes(self, start: Start, probe: Batch) -> None:
        try:
            check_attributes(self.wrapper.model, lambda: self._first_step(start, probe)[0])
        except TaskError:
            raise
        except Exception as error:  # which the trials are the ones to say
            logger.debug("what the model keeps in attributes is not known: %s", first_line(error))

    def _fit_validation(self, start: Start, probe: Batch) -> None:
        """Evaluate in parts for which memory suffices where it suffices for training."""
        row = start.row.clone().requires_grad_()

        def step() -> tuple[Tensor, list[Tensor]]:
            loss, buffers = self._first_step(Start(row, start.buffers), probe)
            return loss, [row, *buffers.values()]

        kept = bytes_kept(step, probe.tensors)
        if kept is not None:
            self.validation.fit(kept / count_examples(probe.tensors))

    def _find_shared(self, first: Start, probe: Batch) -> dict[str, Tensor]:
        """What is equal under two seeds and after a training step."""
        if not first.buffers:
            return {}
        second = self._start(1)
        varying = differing(first.buffers, second.buffers)
        _, after = self._first_step(first, probe)
        varying |= differing(first.buffers, after) | running_statistics(self.wrapper)
        return {name: value for name, value in first.buffers.items() if name not in varying}

    def _call(
        self,
        parameters: Mapping[str, Tensor],
        buffers: dict[str, Tensor],
        batch: Any,
        key: Tensor | None,
        lowered: bool = False,
        smooth: bool = False,
        then: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The wrapper's output for the parameters of one slot, and the buffers as the forward pass left them.

        `lowered` is for vmap. `smooth` has torch's own operations, all of which can be differentiated twice, and no
        autocast. Without a key the dropout within layers is torch's own. `then` is called with the loss while the model
        still has these parameters.
        """
        state = {f"model.{name}": value for name, value in parameters.items()}
        state |= self.shared
        state |= buffers
        for value in (*parameters.values(), *(state[name] for name in self._frozen)):
            value._is_param = True  # what `isinstance(p, nn.Parameter)` goes by
        self.wrapper.calls.key = key
        if key is not None:
            state |= dict.fromkeys(self._keys, key)
        with ExitStack() as stack:
            if lowered:
                stack.enter_context(self._lowering)
            elif self._draws_within and key is not None:
                stack.enter_context(self._lowering_of_dropout)
            if self.autocast and not smooth:
                stack.enter_context(torch.autocast(self.device.type, dtype=torch.bfloat16))
            out = functional_call(self.wrapper, state, (batch, then))
        self.wrapper.calls.key = None
        for name, value in self.shared.items():
            if state[name] is not value:
                raise TaskError(_late_change(name))
        return out, {name: state[name] for name in buffers}

    def _loss(
        self, row: Rows, buffers: dict[str, Tensor], batch: Any, key: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        loss, after = self._call(self.layout.views(row), buffers, batch, key, lowered=True)
        return loss, (loss, after)

    def _fused_gradient(
        self, shared: bool, rows: Rows, buffers: dict[str, Tensor], batch: Any, keys: Tensor | None
    ) -> list[Tensor]:
        """The gradient's segments, losses `[slots]`, and the buffers after the forward pass."""
        self.wrapper.train()
        batched = None if shared else tree_map(lambda t: 0 if isinstance(t, Tensor) else None, batch)
        in_dims = (0, 0, batched, None if keys is None else 0)
        per_slot = grad_and_value(self._loss, has_aux=True)
        grads, (_, (loss, after)) = vmap(per_slot, in_dims=in_dims, randomness="error")(rows, buffers, batch, keys)
        return [*grads, loss, *after.values()]

    def _gradient_one_by_one(
        self, rows: Rows, buffers: dict[str, Tensor], batch: Batch, keys: Tensor | None
    ) -> tuple[Rows, Tensor]:
        self.wrapper.train()
        grads = tuple(torch.zeros_like(segment) for segment in rows)
        losses = rows[0].new_empty(len(rows[0]), dtype=torch.promote_types(rows[0].dtype, torch.float32))
        seeds = [0] * len(losses) if keys is None else keys.tolist()
        with RandomStream(0) as stream, torch.enable_grad():
            for slot, seed in enumerate(seeds):
                stream.reseed(seed)
                parameters = self._parameters(rows, slot)
                own = {name: value[slot] for name, value in buffers.items()}
                key = None if keys is None else keys[slot]
                losses[slot], after = self._call(parameters, own, slice_slot(batch, slot), key, then=self._backward)
                for to, parameter in zip(
                    self.layout.pieces(tuple(segment[slot] for segment in grads)), parameters.values(), strict=True
                ):
                    if parameter.grad is not None:
                        to.copy_(parameter.grad.to_dense().view(-1))
                for name, value in after.items():
                    buffers[name][slot].copy_(value.detach())
        return grads, losses

    def _parameters(self, rows: Rows, slot: int, trainable: bool = True) -> dict[str, nn.Parameter]:
        """The parameters of one slot, in the memory of its row."""
        views = self.layout.views(tuple(segment[slot] for segment in rows))
        return {name: nn.Parameter(view, trainable) for name, view in views.items()}

    def _backward(self, loss: Tensor) -> Tensor:
        """Take the gradient, while the model has the parameters with which checkpointed parts are computed anew."""
        # `loss.backward()` would take the lowering out of force, with which they are computed anew, too.
        engine = torch.autograd.Variable._execution_engine
        with torch.autocast(self.device.type, enabled=False):
            engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
        return loss.detach()

    def _fused_evaluation(self, rows: Rows, buffers: dict[str, Tensor], data: Any) -> list[Tensor]:
        self.wrapper.eval()

        def one(row: Rows, own: dict[str, Tensor]) -> Tensor:
            parameters = self.layout.views(row)

            def without_gradient(parameters: dict[str, Tensor]) -> Tensor:
                with torch.no_grad():
                    return self._call(parameters, own, data, None, lowered=True)[0]

            if not self._asks_for_gradients:
                return without_gradient(parameters)
            out: Tensor = vjp(without_gradient, parameters)[0]  # in which parameters say that they require one
            return out

        return [vmap(one, randomness="error")(rows, buffers)]

    @torch.no_grad()
    def _evaluate_one_by_one(
        self, rows: Rows, buffers: dict[str, Tensor], data: Batch, part: int, trainable: bool = True
    ) -> Tensor:
        self.wrapper.eval()
        found = []
        with RandomStream(0) as stream:
            for slot in range(len(rows[0])):
                stream.reseed(mix_seed(part))
                own = {name: value[slot].clone() for name, value in buffers.items()}
                found.append(self._call(self._parameters(rows, slot, trainable), own, data.tensors, None)[0])
        return torch.stack(found)

    def _why_not_fused(self, probe: Batch) -> str | None:
        """None if vmap batches the model well and rightly, else the reason in one line."""
        starts = [self.start(seed) for seed in (0, 1)]
        rows = self.layout.stack([s.row for s in starts])
        keys = torch.arange(2, dtype=torch.int64, device=self.device) if self.draws else None

        def buffers() -> dict[str, Tensor]:
            return {n: torch.stack([s.buffers[n] for s in starts]) for n in starts[0].buffers}

        try:
            with RandomStream(0), vmap_warnings() as slow:
                data = next(iter(self.validation)).batch
                before = random.getstate(), str(np.random.get_state())
                found = self._fused_gradient(True, rows, buffers(), probe.tensors, keys)
                solo_evaluated = self._evaluate_one_by_one(rows, buffers(), data, 0)
                first = tuple(segment[:1] for segment in rows), {n: value[:1] for n, value in buffers().items()}
                as_frozen = self._evaluate_one_by_one(*first, data, 0, trainable=False)
                self._asks_for_gradients = not torch.equal(as_frozen, solo_evaluated[:1])
                with torch.no_grad():
                    (evaluated,) = self._fused_evaluation(rows, buffers(), data.tensors)
                if before != (random.getstate(), str(np.random.get_state())):
                    return "it draws from Python's or NumPy's random generator, which slots cannot share"
        except Exception as error:
            lines = str(error).strip().splitlines()
            return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        if slow:
            return slow[0]
        fused, losses = torch.cat(found[: len(rows)], dim=1), found[len(rows)]
        solo, solo_losses = self._gradient_one_by_one(rows, buffers(), probe, keys)
        for what, ours, theirs in (
            ("gradient", fused, torch.cat(solo, dim=1)),
            ("loss", losses, solo_losses),
            ("validation loss", evaluated[:, 0], solo_evaluated[:, 0]),
        ):
            difference = relative_difference(ours, theirs)
            # bfloat16 rounds the two so coarsely that nothing follows from a difference.
            if difference > PARITY_TOLERANCE and not self.autocast:
                return f"its fused {what} differs from the solo one by {difference:.1%}"
        return None


def _late_change(name: str) -> str:
    return (
        f"task.model: {name.removeprefix('model.')} did not change in the first training step but did later; "
        "let the model write to its buffers in every training step or in none"
    )
