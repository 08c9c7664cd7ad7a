"""A task's loss and measures as functions of stacked parameters: over all slots at once, or one slot at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from momentum_tuner.tasks import Task
from momentum_tuner.trainer.data import Batch, Validation, slice_slot
from momentum_tuner.trainer.dropout import key_dropout
from momentum_tuner.trainer.layout import Layout, differing, seeded, state_beside_parameters

PARITY_TOLERANCE = 1e-2
"""Relative difference of a fused gradient from a solo one above which a model is not trusted to vmap."""


@dataclass(frozen=True)
class Start:
    """An untrained model: its row of parameters `[parameters]` and its own (not shared) buffers."""

    row: Tensor
    buffers: dict[str, Tensor]


class _Wrapper(nn.Module):
    """The task's model, with its loss and metrics as the forward pass, so that `functional_call` reaches all."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.key_names, self._calls = key_dropout(model)

    def forward(self, batch: Any) -> Tensor:
        self._calls.made = 0
        loss = self.task.loss(self.model, batch)
        if self.training:
            return loss
        others = [metric(self.model, batch) for metric in self.task.metrics.values()]
        return torch.stack([loss, *(m.to(loss.dtype) for m in others)])


class Objective:
    """The loss of a task over slots, its gradient, and its evaluation.

    `batch_slots` says whether slots train fused; where they cannot, `reason` says why.

    Args:
        task: model factory, loss and metrics.
        device: where the model lives.
        precision: `auto` (the model's own dtype), `float32`, `float64`, or `bfloat16` (autocast).
        probe: a training batch, to see whether vmap can batch the model.
        mode: `fused`, `sequential`, or `auto` (fused where the probe allows it).
    """

    def __init__(self, task: Task, device: torch.device, precision: str, probe: Batch, mode: str = "auto") -> None:
        self.task = task
        self.device = device
        self.autocast = precision == "bfloat16"
        self._dtype = data_dtype(precision)
        self.validation = Validation(task, device, self._dtype)
        with seeded(0):
            model = self._build()
        self.wrapper = _Wrapper(model, task)
        self.keys = tuple(f"model.{name}" for name in self.wrapper.key_names)
        self.layout = Layout.of(model)
        first = self._start(0)
        self.shared = self._find_shared(first, probe)
        """Buffers and frozen parameters that are alike for every seed and never change: held once, not per slot."""
        self.reason: str | None = None
        if mode == "sequential":
            self.reason = "asked for"
        elif mode == "auto":
            self.reason = self._why_not_fused(probe)
        self.batch_slots = self.reason is None

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the evaluation's columns: the loss, then the task's metrics."""
        return ("loss", *self.task.metrics)

    def start(self, seed: int) -> Start:
        """The untrained model under a seed."""
        start = self._start(seed)
        own = {name: value for name, value in start.buffers.items() if name not in self.shared}
        return Start(start.row, own)

    def gradient(
        self, rows: Tensor, buffers: dict[str, Tensor], batch: Batch, keys: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradient `[slots, parameters]` and loss `[slots]` at `rows`; buffers `[slots, ...]` are updated in place.

        Args:
            rows: `[slots, parameters]`.
            buffers: the slots' own buffers by name.
            batch: one minibatch for all slots, or one each.
            keys: `[slots]` int64, what the slots' random numbers follow from, or None if the model draws none.
        """
        self.wrapper.train()
        if not self.batch_slots:
            return self._gradient_one_by_one(rows, buffers, batch, keys)
        grads, (loss, after) = self._fused_gradient(rows, buffers, batch, keys)
        for name, value in after.items():
            if value is not buffers[name]:
                buffers[name].copy_(value)
        return grads, loss

    @torch.no_grad()
    def evaluate(self, rows: Tensor, buffers: dict[str, Tensor], data: Batch) -> Tensor:
        """Loss and metrics `[slots, 1 + metrics]` at `rows` on one batch that all slots share, in eval mode."""
        self.wrapper.eval()
        if self.batch_slots:
            fused: Tensor = vmap(self._forward, in_dims=(0, 0, None, None), randomness="error")(
                rows, buffers, data.tensors, None
            )
            return fused
        return torch.stack(
            [
                self._forward(rows[slot], {n: b[slot] for n, b in buffers.items()}, data.tensors, None)
                for slot in range(len(rows))
            ]
        )

    def _build(self) -> nn.Module:
        model = self.task.model()
        return model.to(dtype=self._dtype) if self._dtype is not None else model

    def _start(self, seed: int) -> Start:
        with seeded(seed):
            model = self._build()
        buffers = {f"model.{n}": b.detach().clone().to(self.device) for n, b in state_beside_parameters(model).items()}
        return Start(self.layout.flatten(model).to(self.device), buffers)

    def _find_shared(self, first: Start, probe: Batch) -> dict[str, Tensor]:
        """What is equal under two seeds and after a training step."""
        self.wrapper.to(self.device)
        if not first.buffers:
            self.shared = {}
            return {}
        self.shared = {}
        second = self._start(1)
        varying = differing(first.buffers, second.buffers)
        after = {name: value.clone() for name, value in first.buffers.items()}
        self.wrapper.train()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            _, after = self._call(first.row, after, slice_slot(probe, 0), None)
        varying |= differing(first.buffers, after)
        return {name: value for name, value in first.buffers.items() if name not in varying}

    def _call(
        self, row: Tensor, buffers: dict[str, Tensor], batch: Any, key: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The wrapper's output, and the buffers as the forward pass left them."""
        state = {f"model.{name}": value for name, value in self.layout.views(row).items()}
        state |= self.shared
        state |= buffers
        if key is not None:
            state |= dict.fromkeys(self.keys, key)
        if self.autocast:
            with torch.autocast(self.device.type, dtype=torch.bfloat16):
                out = functional_call(self.wrapper, state, (batch,))
        else:
            out = functional_call(self.wrapper, state, (batch,))
        return out, {name: state[name] for name in buffers}

    def _forward(self, row: Tensor, buffers: dict[str, Tensor], batch: Any, key: Tensor | None) -> Tensor:
        return self._call(row, buffers, batch, key)[0]

    def _loss(
        self, row: Tensor, buffers: dict[str, Tensor], batch: Any, key: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        loss, after = self._call(row, buffers, batch, key)
        return loss, (loss, after)

    def _fused_gradient(
        self, rows: Tensor, buffers: dict[str, Tensor], batch: Batch, keys: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        in_dims = (0, 0, None if batch.shared else 0, None if keys is None else 0)
        per_slot = grad_and_value(self._loss, has_aux=True)
        grads, (_, aux) = vmap(per_slot, in_dims=in_dims, randomness="error")(rows, buffers, batch.tensors, keys)
        return grads, aux

    def _gradient_one_by_one(
        self, rows: Tensor, buffers: dict[str, Tensor], batch: Batch, keys: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        grads = torch.empty_like(rows)
        losses = torch.empty(len(rows), dtype=rows.dtype, device=rows.device)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            for slot in range(len(rows)):
                key = None if keys is None else keys[slot]
                if key is not None:
                    torch.manual_seed(int(key))
                row = rows[slot].detach().requires_grad_()
                own = {name: value[slot] for name, value in buffers.items()}
                loss, after = self._call(row, own, slice_slot(batch, slot), key)
                (grads[slot],) = torch.autograd.grad(loss, row)
                losses[slot] = loss.detach()
                for name, value in after.items():
                    buffers[name][slot].copy_(value)
        return grads, losses

    def _why_not_fused(self, probe: Batch) -> str | None:
        """None if vmap batches the model well and rightly, else the reason in one line."""
        starts = [self.start(seed) for seed in (0, 1)]
        rows = torch.stack([s.row for s in starts])
        keys = torch.arange(2, dtype=torch.int64, device=self.device) if self.keys else None

        def buffers() -> dict[str, Tensor]:
            return {n: torch.stack([s.buffers[n] for s in starts]) for n in starts[0].buffers}

        self.wrapper.train()
        try:
            with vmap_warnings() as slow:
                fused, _ = self._fused_gradient(rows, buffers(), probe, keys)
            self.wrapper.eval()
            with vmap_warnings() as slow_evaluation, torch.no_grad():
                vmap(self._forward, in_dims=(0, 0, None, None), randomness="error")(
                    rows, buffers(), slice_slot(probe, 0), None
                )
        except Exception as error:
            return (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
            )
        for message in (*slow, *slow_evaluation):
            return message
        self.wrapper.train()
        solo, _ = self._gradient_one_by_one(rows, buffers(), probe, keys)
        scale = solo.norm().clamp_min(torch.finfo(solo.dtype).tiny)
        difference = float((fused - solo).norm() / scale)
        if difference > PARITY_TOLERANCE and not self.autocast:
            return f"its fused gradient differs from the solo one by {difference:.1%}"
        return None


def data_dtype(precision: str) -> torch.dtype | None:
    """The dtype of models and data under a precision of the study file; None leaves them as the task made them."""
    return {"float32": torch.float32, "float64": torch.float64}.get(precision)


@contextmanager
def vmap_warnings() -> Iterator[list[str]]:
    """Collect torch's warnings that an operation has no batching rule and runs as a slow loop, in short form."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    for warning in caught:
        text = str(warning.message)
        if "performance drop" in text:
            operation = text.split("batching rule for ", 1)[-1].split(".", 1)[0]
            found.append(f"vmap has no batching rule for {operation} and would loop over the slots")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
