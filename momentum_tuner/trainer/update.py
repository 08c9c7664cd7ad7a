"""What an optimizer step does once it has the gradient, as functions of stacked tensors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from momentum_tuner.optim import Rule, clip_scale
from momentum_tuner.trainer.layout import Layout, Rows

UPDATE = "update"
"""A whole optimizer step as `Replay` knows it, where it is compiled."""


class Standing(NamedTuple):
    """Which slots train on, `[slots]` each.

    Attributes:
        limit: the loss above which a trial is diverged.
        active: whether it is not diverged so far.
        taken: steps of the epoch that it took.
    """

    limit: Tensor
    active: Tensor
    taken: Tensor

    def after(self, loss: Tensor) -> Standing:
        """The standing that losses `[slots]` lead to."""
        active = self.active & loss.isfinite() & (loss <= self.limit)
        return Standing(self.limit, active, self.taken + active)


def measures_of(taken: Tensor, *measures: Tensor) -> Tensor:
    """The measures of a step, `[slots]` each, as a row of its epoch's table `[measures, slots]`."""
    return torch.stack([measure.to(taken.dtype) for measure in measures])


def gradient_norms(layout: Layout, grads: Rows, roots: Tensor) -> tuple[Tensor, Tensor]:
    """Global gradient norm `[slots]`, and largest over smallest non-zero per-tensor RMS `[slots]`.

    Args:
        layout: of the rows.
        grads: the gradient.
        roots: `[tensors]`, of the parameter tensors' sizes, in the dtype of the measures.
    """
    wide = roots.dtype
    norms = torch.stack([torch.linalg.vector_norm(piece, dim=1, dtype=wide) for piece in layout.pieces(grads)])
    total = torch.linalg.vector_norm(norms, dim=0)
    if len(norms) == 1:
        return total, torch.ones_like(total)
    rms = norms / roots[:, None]
    smallest = torch.where(rms > 0, rms, torch.inf).amin(0)
    return total, rms.amax(0) / smallest


def write_update(
    rule: Rule, rows: Rows, grads: Rows, moments: Mapping[str, Rows], factors: Mapping[str, Tensor], update: Rows
) -> None:
    """Let a rule write the update of its slots, segment by segment.

    Where the update is wider than the parameters, the rule computes as wide as that, as torch.optim's kernels do, and
    only what is kept is rounded.

    Args:
        rule: of all these slots.
        rows: their parameters.
        grads: their gradient.
        moments: the rule's, changed in place.
        factors: what `rule.prepare` made of the hyperparameters.
        update: where it is written.
    """
    for i, (segment, grad, out) in enumerate(zip(rows, grads, update, strict=True)):
        own = {name: m[i] for name, m in moments.items()}
        if segment.dtype == out.dtype:
            rule.apply(segment, grad, own, factors, out)
            continue
        widened = {name: moment.to(out.dtype) for name, moment in own.items()}
        rule.apply(segment.to(out.dtype), grad.to(out.dtype), widened, factors, out)
        for name, moment in own.items():
            moment.copy_(widened[name])


def move(rows: Rows, update: Rows, previous: Rows, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add an update to the rows; returns its L2 norm and its dot product with the one before, `[slots]` each.

    Args:
        rows: changed in place.
        update: changed to 0 in slots that do not move.
        previous: the update before; overwritten.
        mask: `[slots, 1]`, the slots that do not move, or None if all do.
    """
    norms, dots = [], []
    for row, segment, before in zip(rows, update, previous, strict=True):
        if mask is not None:
            segment.masked_fill_(mask, 0.0)
        row.add_(segment)
        norms.append(torch.linalg.vector_norm(segment, dim=1))
        dots.append(torch.mul(segment, before, out=before).sum(1))
    if len(norms) == 1:
        return norms[0], dots[0]
    return torch.linalg.vector_norm(torch.stack(norms), dim=0), torch.stack(dots).sum(0)


@dataclass(frozen=True)
class WholeStep:
    """Measures, clipping, update and move in one function of a flat list of tensors, for slots of one rule.

    Attributes:
        layout: of the rows.
        rule: the update rule.
        clips: whether gradients are clipped.
    """

    layout: Layout
    rule: Rule
    clips: bool

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        """Move the slots; returns the measures as `Stack.step` does, and of their standing what changed.

        Args:
            tensors: parameters, gradient, previous update and the rule's moments, each in segments; then `[slots]`
                each the loss, the three of the standing, the count of steps, the norm to clip to if `clips`, and all
                the rule's hyperparameters; then the roots as in `gradient_norms`. The update takes the previous one's
                place.
        """
        rest = iter(tensors)

        def segments() -> Rows:
            return tuple(itertools.islice(rest, len(self.layout.segments)))

        rows, grads, previous = (segments() for _ in range(3))
        moments = {name: segments() for name in self.rule.moments}
        loss = next(rest)
        standing = Standing(*itertools.islice(rest, 3)).after(loss)
        count = next(rest)
        max_norm = next(rest) if self.clips else None
        hyper = {name: next(rest) for name in self.rule.hyperparameters}
        norm, ratio = gradient_norms(self.layout, grads, next(rest))
        if max_norm is not None:
            grads = clipped(grads, norm, max_norm)
        update = tuple(torch.empty_like(segment) for segment in previous)  # needs no memory, compiled
        write_update(self.rule, rows, grads, moments, self.rule.prepare(hyper, count), update)
        moved = move(rows, update, previous, ~standing.active[:, None])
        for before, segment in zip(previous, update, strict=True):
            before.copy_(segment)
        return [measures_of(standing.taken, loss, norm, ratio, *moved), standing.active, standing.taken]


def clipped(grads: Rows, norm: Tensor, max_norm: Tensor) -> Rows:
    """New gradients of at most a norm, as in torch.nn.utils.clip_grad_norm_; `norm` and `max_norm` `[slots]`."""
    scale = clip_scale(norm, max_norm)[:, None]
    return tuple(segment * scale for segment in grads)
