"""The stacked tensors of a batch of slots, and one optimizer step over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from momentum_tuner.optim import OPTIONAL_HYPERPARAMETERS, RULES, Rule, lookahead_point
from momentum_tuner.trainer.data import Batch
from momentum_tuner.trainer.objective import Objective
from momentum_tuner.trainer.state import TrialSettings

_ROOM = 1 << 16
"""Bytes that hold all the `[slots]` tensors of an update; less than what allocators give back at once."""


def by_rule(settings: TrialSettings) -> int:
    """What slots are sorted by, so that those of one update rule lie side by side."""
    return list(RULES).index(settings.rule.name)


@dataclass
class Slice:
    """Neighbouring slots of one update rule, with their moments and constant hyperparameters."""

    rule: Rule
    start: int
    stop: int
    moments: dict[str, Tensor]  # [stop - start, parameters] each
    hyper: dict[str, Tensor]  # [stop - start] each

    @property
    def rows(self) -> slice:
        """Its rows in the stack."""
        return slice(self.start, self.stop)


class Stack:
    """Parameters, moments and buffers of slots, one row per slot.

    Args:
        objective: gradient of the task.
        settings: of each slot, sorted by `by_rule`.
        states: the tensors of each slot's state, which are copied.
    """

    def __init__(
        self, objective: Objective, settings: Sequence[TrialSettings], states: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.objective = objective
        self.rows = torch.stack([s["parameters"] for s in states])
        self.previous = torch.stack([s["previous_update"] for s in states])
        self.update = torch.empty_like(self.rows)
        prefix = "buffer/"
        self.buffers = {
            name.removeprefix(prefix): torch.stack([s[name] for s in states])
            for name in states[0]
            if name.startswith(prefix)
        }
        self.slices: list[Slice] = []
        start = 0
        while start < len(states):
            rule = settings[start].rule
            stop = start
            while stop < len(states) and settings[stop].rule is rule:
                stop += 1
            moments = {m: torch.stack([s[f"moment/{m}"] for s in states[start:stop]]) for m in rule.moments}
            self.slices.append(Slice(rule, start, stop, moments, self._constants(rule, settings[start:stop])))
            start = stop
        self._roots = self.column([size**0.5 for size in objective.layout.sizes])  # of the parameter tensors' sizes
        self._looking_ahead = [s for s in self.slices if s.rule.lookahead]
        self._room = max([_ROOM, *(self._room_for(s) for s in self.slices)])

    def tensors(self, index: int) -> dict[str, Tensor]:
        """One slot's tensors by their names in a state, as views."""
        piece = next(s for s in self.slices if s.start <= index < s.stop)
        tensors = {"parameters": self.rows[index], "previous_update": self.previous[index]}
        tensors |= {f"moment/{name}": m[index - piece.start] for name, m in piece.moments.items()}
        tensors |= {f"buffer/{name}": b[index] for name, b in self.buffers.items()}
        return tensors

    def column(self, values: Sequence[float]) -> Tensor:
        """One value per slot, as the rows are."""
        return torch.tensor(values, dtype=self.rows.dtype, device=self.rows.device)

    def gradient(
        self, batch: Batch, keys: Tensor | None, cycle: Tensor | None, fused: bool | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Gradient `[slots, parameters]`, loss `[slots]` and the buffers after the forward pass; changes nothing.

        Args:
            batch: one minibatch for all slots, or one each.
            keys: `[slots]`, what the slots' random numbers follow from, or None.
            cycle: `[slots]`, the factor of momentum, or None.
            fused: all slots at once or one after the other; None as the objective has it.
        """
        point = self.rows if not self._looking_ahead else self._ahead(cycle)
        # The forward pass writes to its buffers before anyone knows whether the step will succeed.
        buffers = {name: value.clone() for name, value in self.buffers.items()}
        grads, loss = self.objective.gradient(point, buffers, batch, keys, fused)
        return grads, loss, buffers

    def gradient_norms(self, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Global gradient norm `[slots]`, and largest over smallest non-zero per-tensor RMS `[slots]`."""
        sizes = self.objective.layout.sizes
        norms = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in torch.split(grads, list(sizes), dim=1)])
        total = torch.linalg.vector_norm(norms, dim=0)
        if len(sizes) == 1:
            return total, torch.ones_like(total)
        rms = norms / self._roots[:, None]
        smallest = torch.where(rms > 0, rms, torch.inf).amin(0)
        return total, rms.amax(0) / smallest

    def make_room(self) -> None:
        """See that memory suffices for `apply`, which cannot stop halfway: what is freed here is there for it."""
        torch.empty(self._room, dtype=torch.uint8, device=self.rows.device)

    def apply(
        self, grads: Tensor, rate: Tensor, cycle: Tensor | None, count: Tensor, active: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Move the slots by one update, in place.

        Args:
            grads: `[slots, parameters]`.
            rate: `[slots]`, learning rates.
            cycle: `[slots]`, the factor of momentum, or None.
            count: `[slots]`, the number of this step in its trial, from 1.
            active: `[slots]`; the others stay where they are.

        Returns:
            The update's L2 norm `[slots]` and its dot product with the update before `[slots]`.
        """
        update = self._take(grads, rate, cycle, count)
        on_cpu = self.rows.device.type == "cpu"
        if not on_cpu or not bool(active.all()):  # asking costs nothing where no transfer is needed
            update.masked_fill_(~active[:, None], 0.0)
        self.rows += update
        norm = torch.linalg.vector_norm(update, dim=1)
        dot = torch.mul(update, self.previous, out=self.previous).sum(1)
        self.update, self.previous = self.previous, update
        return norm, dot

    def _constants(self, rule: Rule, settings: Sequence[TrialSettings]) -> dict[str, Tensor]:
        """Hyperparameters of a rule's slots, `[slots]` each; optional ones that all slots leave at 0 are left out."""
        values = {name: [one.value(name) for one in settings] for name in rule.hyperparameters}
        return {
            name: self.column(column)
            for name, column in values.items()
            if any(column) or name not in OPTIONAL_HYPERPARAMETERS
        }

    def _room_for(self, piece: Slice) -> int:
        """Bytes that a rule's update may take besides `[slots]` tensors: RMSprop's decayed gradient."""
        decayed = piece.rule.name == "rmsprop" and "weight_decay" in piece.hyper
        return self.rows[piece.rows].nbytes if decayed else 0

    def _ahead(self, cycle: Tensor | None) -> Tensor:
        """The rows, with those of look-ahead rules moved to where their gradient is taken."""
        point = self.rows.clone()
        for piece in self._looking_ahead:
            momentum = piece.hyper["momentum"]
            if cycle is not None:
                momentum = momentum * cycle[piece.rows]
            point[piece.rows] = lookahead_point(self.rows[piece.rows], piece.moments["velocity"], momentum)
        return point

    def _take(self, grads: Tensor, rate: Tensor, cycle: Tensor | None, count: Tensor) -> Tensor:
        """Let each rule write its slots' updates; returns `[slots, parameters]`."""
        for piece in self.slices:
            hyper = dict(piece.hyper, learning_rate=rate[piece.rows])
            if cycle is not None:
                for name in ("momentum", "beta1"):
                    if name in hyper:
                        hyper[name] = hyper[name] * cycle[piece.rows]
            piece.rule.update(
                self.rows[piece.rows],
                grads[piece.rows],
                piece.moments,
                hyper,
                count[piece.rows],
                self.update[piece.rows],
            )
        return self.update
