"""Update rules as pure functions over stacked tensors: row i of every tensor belongs to the trial in slot i.

Hyperparameters are tensors of one value per slot, so that trials with different settings share every
operation and a change of value never recompiles. An update reads no value back to the host, and works in
`out` and the moments instead of allocating tensors of the parameters' size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Update = Callable[[Tensor, Tensor, Tensors, Tensors, Tensor, Tensor], Tensor]
"""`update(params, grads, moments, hyper, count, out) -> out`; the contract is in `Rule`."""

OPTIONAL_HYPERPARAMETERS = frozenset({"dampening", "nesterov", "weight_decay"})
"""Hyperparameters that `hyper` may lack: they are then zero in all slots, and their passes are skipped."""


@dataclass(frozen=True)
class Rule:
    """An update rule that trains many slots at once.

    `update(params, grads, moments, hyper, count, out)` writes the update u_t into `out` and returns it, such
    that theta_t = theta_{t-1} + u_t. All tensors have one floating dtype and one device; none requires grad.

    - params, grads: [slots, parameters], left unchanged.
    - moments: [slots, parameters] for each name in `moments`, zero before the first step; updated in place.
    - hyper: [slots] for each name in `hyperparameters`, of which those in `OPTIONAL_HYPERPARAMETERS` may be
      missing; every value may change from step to step.
    - count: [slots], the number of this step in its trial, counted from 1.
    - out: [slots, parameters], overwritten; shares no memory with the others.

    Attributes:
        name: its name in `RULES`.
        moments: names of its state tensors.
        hyperparameters: names of the hyperparameters it reads.
        update: the function above.
        lookahead: whether `grads` is to be taken at `lookahead_point(params, velocity, momentum)`.
    """

    name: str
    moments: tuple[str, ...]
    hyperparameters: tuple[str, ...]
    update: Update
    lookahead: bool = False


def lookahead_point(params: Tensor, velocity: Tensor, momentum: Tensor, *, out: Tensor | None = None) -> Tensor:
    """The point theta - beta v at which a rule with `lookahead` takes its gradient (Nesterov 1983).

    Args:
        params: [slots, parameters].
        velocity: [slots, parameters], the moment of that name before the update.
        momentum: [slots].
        out: [slots, parameters], where to write it; a new tensor if missing.
    """
    return torch.addcmul(params, velocity, -momentum[:, None], out=out)


def clip_scale(grad_norm: Tensor, max_norm: Tensor) -> Tensor:
    """The factor that clips each slot's gradient, as in torch.nn.utils.clip_grad_norm_.

    Args:
        grad_norm: [slots], global L2 norm of the gradient.
        max_norm: [slots]; infinity does not clip.

    Returns:
        [slots], min(1, max_norm / (grad_norm + 1e-6)).
    """
    scale = (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
    return scale.masked_fill(max_norm.isinf(), 1.0)  # inf / inf would be NaN


def _decayed(params: Tensor, grads: Tensor, hyper: Tensors, out: Tensor | None) -> Tensor:
    """The gradient with the L2 penalty's: in `out`, or `grads` itself if no slot decays its weights."""
    if "weight_decay" not in hyper:
        return grads
    return torch.addcmul(grads, params, hyper["weight_decay"][:, None], out=out)


def _sgd(params: Tensor, grads: Tensor, moments: Tensors, hyper: Tensors, count: Tensor, out: Tensor) -> Tensor:
    # v = momentum v + (1 - dampening) d;  u = -lr v, or -lr (d + momentum v) for Nesterov
    momentum, step_size = hyper["momentum"], -hyper["learning_rate"]  # [slots]
    velocity = moments["velocity"]  # [slots, parameters]
    d = _decayed(params, grads, hyper, out)  # [slots, parameters]
    if "dampening" in hyper:
        # torch dampens neither the first step nor plain SGD.
        undamped = (count == 1) | (momentum == 0)  # [slots]
        gain = torch.where(undamped, 1.0, 1.0 - hyper["dampening"])  # [slots]
        velocity.mul_(momentum[:, None]).addcmul_(d, gain[:, None])
    else:
        torch.addcmul(d, velocity, momentum[:, None], out=velocity)
    if "nesterov" not in hyper:
        return torch.mul(velocity, step_size[:, None], out=out)
    from_gradient = step_size * hyper["nesterov"]  # [slots]
    from_velocity = torch.where(hyper["nesterov"] == 0, step_size, step_size * momentum)  # [slots]
    torch.mul(d, from_gradient[:, None], out=out)
    return out.addcmul_(velocity, from_velocity[:, None])


def _momentum_classic(
    params: Tensor, grads: Tensor, moments: Tensors, hyper: Tensors, count: Tensor, out: Tensor
) -> Tensor:
    # v = momentum v + lr d;  u = -v
    velocity = moments["velocity"]  # [slots, parameters]
    d = _decayed(params, grads, hyper, out)  # [slots, parameters]
    velocity.mul_(hyper["momentum"][:, None]).addcmul_(d, hyper["learning_rate"][:, None])
    return torch.neg(velocity, out=out)


def _nesterov_lookahead(
    params: Tensor, grads: Tensor, moments: Tensors, hyper: Tensors, count: Tensor, out: Tensor
) -> Tensor:
    # The L2 penalty is part of the objective, so its gradient too is taken at the looked-ahead point.
    if "weight_decay" in hyper:
        params = lookahead_point(params, moments["velocity"], hyper["momentum"], out=out)
    return _momentum_classic(params, grads, moments, hyper, count, out)


def _root_mean_square(square: Tensor, d: Tensor, averaging: Tensor, out: Tensor) -> Tensor:
    """The root, in `out`, of `square` once d^2 is averaged into it; `averaging` [slots]; `d` may be `out`."""
    torch.mul(d, d, out=out)
    square.lerp_(out, (1.0 - averaging)[:, None])
    return torch.sqrt(square, out=out)


def _adam_step(d: Tensor, moments: Tensors, hyper: Tensors, count: Tensor, out: Tensor) -> Tensor:
    # u = -lr (m / c1) / (sqrt(s / c2) + eps) = -lr (sqrt(c2) / c1) m / (sqrt(s) + sqrt(c2) eps)
    beta1, beta2 = hyper["beta1"], hyper["beta2"]  # [slots]
    first = moments["first_moment"].lerp_(d, (1.0 - beta1)[:, None])  # [slots, parameters]
    root_correction2 = (1.0 - beta2**count).sqrt()  # [slots]
    step_size = -hyper["learning_rate"] * root_correction2 / (1.0 - beta1**count)  # [slots]
    _root_mean_square(moments["second_moment"], d, beta2, out).add_((root_correction2 * hyper["eps"])[:, None])
    return torch.div(first, out, out=out).mul_(step_size[:, None])


def _adam(params: Tensor, grads: Tensor, moments: Tensors, hyper: Tensors, count: Tensor, out: Tensor) -> Tensor:
    return _adam_step(_decayed(params, grads, hyper, out), moments, hyper, count, out)


def _adamw(params: Tensor, grads: Tensor, moments: Tensors, hyper: Tensors, count: Tensor, out: Tensor) -> Tensor:
    _adam_step(grads, moments, hyper, count, out)
    if "weight_decay" in hyper:
        shrink = -hyper["learning_rate"] * hyper["weight_decay"]  # [slots]
        out.addcmul_(params, shrink[:, None])
    return out


def _rmsprop(params: Tensor, grads: Tensor, moments: Tensors, hyper: Tensors, count: Tensor, out: Tensor) -> Tensor:
    # u = -lr d / (sqrt(s) + eps): out holds the denominator while d is still needed, so d is not kept there.
    d = _decayed(params, grads, hyper, None)  # [slots, parameters]
    _root_mean_square(moments["mean_square"], d, hyper["alpha"], out).add_(hyper["eps"][:, None])
    return torch.div(d, out, out=out).mul_(-hyper["learning_rate"][:, None])


_HEAVY_BALL = ("learning_rate", "momentum", "weight_decay")
_ADAM = ("learning_rate", "beta1", "beta2", "eps", "weight_decay")

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule("sgd", ("velocity",), (*_HEAVY_BALL, "dampening", "nesterov"), _sgd),
            Rule("momentum_classic", ("velocity",), _HEAVY_BALL, _momentum_classic),
            Rule("nesterov_lookahead", ("velocity",), _HEAVY_BALL, _nesterov_lookahead, lookahead=True),
            Rule("adam", ("first_moment", "second_moment"), _ADAM, _adam),
            Rule("adamw", ("first_moment", "second_moment"), _ADAM, _adamw),
            Rule("rmsprop", ("mean_square",), ("learning_rate", "alpha", "eps", "weight_decay"), _rmsprop),
        )
    }
)
"""Update rules by the name that `catalog.OPTIMIZERS` gives them.

- `sgd`: torch.optim.SGD; plain SGD, momentum and Nesterov are values of `momentum` and `nesterov` (0 or 1).
- `momentum_classic`: v = beta v + lr g; theta -= v (Polyak 1964, as in Sutskever et al. 2013).
- `nesterov_lookahead`: the same with g taken at theta - beta v (Nesterov 1983, as in Sutskever et al. 2013).
- `adam`, `adamw`, `rmsprop`: torch.optim.Adam, AdamW and RMSprop (not centred, without momentum).
"""
