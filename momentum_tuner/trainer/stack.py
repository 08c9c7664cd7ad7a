"""The stacked tensors of a batch of slots, and one optimizer step over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from momentum_tuner.optim import OPTIONAL_HYPERPARAMETERS, RULES, Rule, lookahead_point
from momentum_tuner.trainer.data import Batch
from momentum_tuner.trainer.layout import Rows
from momentum_tuner.trainer.objective import Objective
from momentum_tuner.trainer.replay import Call
from momentum_tuner.trainer.state import TrialSettings, table_dtype
from momentum_tuner.trainer.update import (
    UPDATE,
    Standing,
    WholeStep,
    clipped,
    gradient_norms,
    measures_of,
    move,
    write_update,
)

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
    moments: dict[str, Rows]
    hyper: dict[str, Tensor]  # [stop - start] each
    call: Call | None = None  # the compiled step, once one was taken

    @property
    def rows(self) -> slice:
        """Its rows in the stack."""
        return slice(self.start, self.stop)

    def of(self, segments: Rows) -> Rows:
        """Its part of a stack's segments."""
        if len(segments[0]) == self.stop - self.start:
            return segments
        return tuple(segment[self.start : self.stop] for segment in segments)


class Stack:
    """Parameters, moments and buffers of slots, one row per slot.

    Attributes:
        torn: whether an update has begun and not ended; what began it says when it has.

    Args:
        objective: gradient of the task.
        settings: of each slot, sorted by `by_rule`.
        states: the tensors of each slot's state, which are copied.
    """

    def __init__(
        self, objective: Objective, settings: Sequence[TrialSettings], states: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.objective = objective
        layout = objective.layout
        self._wide = table_dtype(layout.dtype)
        self.rows = layout.stack([s["parameters"] for s in states])
        self.previous = layout.stack([s["previous_update"] for s in states])
        self.update = tuple(torch.empty_like(segment) for segment in self.previous)
        self.torn = False
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
            moments = {m: layout.stack([s[f"moment/{m}"] for s in states[start:stop]]) for m in rule.moments}
            self.slices.append(Slice(rule, start, stop, moments, self._constants(rule, settings[start:stop])))
            start = stop
        self._zero = self.column([0.0] * len(states))
        self._roots = self.column([size**0.5 for size in layout.sizes])  # of the parameter tensors' sizes
        self._looking_ahead = [s for s in self.slices if s.rule.lookahead]
        self._room = max([_ROOM, *(self._room_for(s) for s in self.slices)])

    def tensors(self, which: slice = slice(None)) -> list[dict[str, Tensor]]:
        """The tensors of some slots by their names in a state."""

        def flat(rows: Rows, which: slice) -> Tensor:
            return self.objective.layout.join(tuple(segment[which] for segment in rows))

        parameters, previous = flat(self.rows, which), flat(self.previous, which)
        found = [
            {"parameters": one, "previous_update": before} for one, before in zip(parameters, previous, strict=True)
        ]
        chosen = range(len(self.rows[0]))[which]
        for piece in self.slices:
            inside = [(i, slot) for i, slot in enumerate(chosen) if piece.start <= slot < piece.stop]
            if inside:
                rows = slice(inside[0][1] - piece.start, inside[-1][1] - piece.start + 1)
                moments = {f"moment/{name}": flat(m, rows) for name, m in piece.moments.items()}
                for row, (i, _) in enumerate(inside):
                    found[i] |= {name: m[row] for name, m in moments.items()}
        for i, slot in enumerate(chosen):
            found[i] |= {f"buffer/{name}": b[slot] for name, b in self.buffers.items()}
        return found

    def column(self, values: Sequence[float]) -> Tensor:
        """One value per slot, in the table's dtype: to a bfloat16 0.999 is 1."""
        return torch.tensor(values, dtype=self._wide, device=self.rows[0].device)

    def gradient(
        self, batch: Batch, keys: Tensor | None, cycle: Tensor | None, fused: bool | None = None
    ) -> tuple[Rows, Tensor, dict[str, Tensor]]:
        """Gradient, loss `[slots]` and the buffers after the forward pass; changes nothing.

        The loss is at least as wide as the table of measures: beside autocast it may come as bfloat16.

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
        if loss.dtype != self._wide:
            loss = loss.to(torch.promote_types(loss.dtype, self._wide))
        return grads, loss, buffers

    def step(
        self,
        grads: Rows,
        loss: Tensor,
        standing: Standing,
        max_norm: Tensor | None,
        rate: Tensor,
        cycle: Tensor | None,
        count: Tensor,
    ) -> tuple[Tensor, Standing]:
        """Move those slots by one update, in place, whose loss says that they train on.

        An error before anything has changed leaves `torn` False; otherwise it is True from then on, after the step as
        well, until the caller sets it back.

        Args:
            grads: the gradient, which is left as it is.
            loss: `[slots]`.
            standing: before this step.
            max_norm: `[slots]`, the norm above which the gradient is clipped, or None.
            rate: `[slots]`, learning rates.
            cycle: `[slots]`, the factor of momentum, or None.
            count: `[slots]`, the number of this step in its trial, from 1.

        Returns:
            The standing after it, and before that the measures `[5, slots]`: the loss; the gradient's global L2 norm;
            the largest over the smallest non-zero RMS of its parameter tensors; the update's L2 norm; the update's dot
            product with the one before.
        """
        if self.objective.replay.is_compiling(UPDATE):
            return self._compiled_step(grads, loss, standing, max_norm, rate, cycle, count)
        standing = standing.after(loss)
        norm, ratio = self.gradient_norms(grads)
        if max_norm is not None:
            grads = clipped(grads, norm, max_norm)
        self.make_room()
        self.torn = True
        for piece in self.slices:
            factors = piece.rule.prepare(self._hyper(piece, rate, cycle), count[piece.rows])
            write_update(
                piece.rule, piece.of(self.rows), piece.of(grads), piece.moments, factors, piece.of(self.update)
            )
        on_cpu = loss.device.type == "cpu"  # where asking costs nothing, as no transfer is needed
        mask = None if on_cpu and bool(standing.active.all()) else ~standing.active[:, None]
        moved = move(self.rows, self.update, self.previous, mask)
        self.update, self.previous = self.previous, self.update
        return measures_of(standing.taken, loss, norm, ratio, *moved), standing

    def gradient_norms(self, grads: Rows) -> tuple[Tensor, Tensor]:
        """The gradient's measures."""
        return gradient_norms(self.objective.layout, grads, self._roots)

    def make_room(self, room: int = 0) -> None:
        """See that memory suffices for an update, which cannot stop halfway: what is freed here is there for it."""
        torch.empty(max(room, self._room), dtype=torch.uint8, device=self.rows[0].device)

    def _compiled_step(
        self,
        grads: Rows,
        loss: Tensor,
        standing: Standing,
        max_norm: Tensor | None,
        rate: Tensor,
        cycle: Tensor | None,
        count: Tensor,
    ) -> tuple[Tensor, Standing]:
        """As `step`, compiled: all of it in one pass over memory."""
        self.make_room(sum(segment.nbytes for segment in self.rows))  # for slots whose code is not compiled after all
        self.torn = True
        columns = [column for column in (loss, *standing, count, max_norm) if column is not None]
        found = []
        for piece in self.slices:
            stacks = (self.rows, grads, self.previous)
            tensors = [segment for segments in stacks for segment in piece.of(segments)]
            tensors += [segment for name in piece.rule.moments for segment in piece.moments[name]]
            hyper = self._hyper(piece, rate, cycle)
            # Those left out cost nothing here, and so there is one graph for all.
            constants = (hyper.get(name, self._zero[piece.rows]) for name in piece.rule.hyperparameters)
            tensors += [*(column[piece.rows] for column in columns), *constants, self._roots]
            if piece.call is None:
                function = WholeStep(self.objective.layout, piece.rule, max_norm is not None)
                stacked = [True] * (len(tensors) - 1) + [False]
                piece.call = self.objective.replay.prepare(UPDATE, function, tensors, stacked, (function,))
            found.append(piece.call(tensors))
        measures, active, taken = found[0] if len(found) == 1 else (torch.cat(p, -1) for p in zip(*found, strict=True))
        return measures, Standing(standing.limit, active, taken)

    def _hyper(self, piece: Slice, rate: Tensor, cycle: Tensor | None) -> dict[str, Tensor]:
        """A rule's hyperparameters in this step."""
        hyper = dict(piece.hyper, learning_rate=rate[piece.rows])
        if cycle is not None:
            for name in ("momentum", "beta1"):
                if name in hyper:
                    hyper[name] = hyper[name] * cycle[piece.rows]
        return hyper

    def _constants(self, rule: Rule, settings: Sequence[TrialSettings]) -> dict[str, Tensor]:
        """Hyperparameters of a rule's slots, `[slots]` each; optional ones that all slots leave at 0 are left out."""
        values = {name: [one.value(name) for one in settings] for name in rule.hyperparameters}
        return {
            name: self.column(column)
            for name, column in values.items()
            if any(column) or name not in OPTIONAL_HYPERPARAMETERS
        }

    def _room_for(self, piece: Slice) -> int:
        """Bytes that a rule's update may take besides `[slots]` tensors: RMSprop's decayed gradient, widened rows."""
        tensors = int(piece.rule.name == "rmsprop" and "weight_decay" in piece.hyper)
        if self.objective.layout.dtype != self._wide:
            tensors += 2 + len(piece.moments)
        return tensors * max(segment[piece.rows].nbytes for segment in self.update)

    def _ahead(self, cycle: Tensor | None) -> Rows:
        """The rows, with those of look-ahead rules moved to where their gradient is taken."""
        point = tuple(segment.clone() for segment in self.rows)
        for piece in self._looking_ahead:
            momentum = piece.hyper["momentum"]
            if cycle is not None:
                momentum = momentum * cycle[piece.rows]
            for to, segment, velocity in zip(point, self.rows, piece.moments["velocity"], strict=True):
                lookahead_point(segment[piece.rows], velocity, momentum, out=to[piece.rows])
        return point
