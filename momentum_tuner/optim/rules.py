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
Prepare = Callable[[Tensors, Tensor], Tensors]
"""`prepare(hyper, count) -> factors`; the contract is in `Rule`."""
Apply = Callable[[Tensor, Tensor, Tensors, Tensors, Tensor], Tensor]
"""`apply(params, grads, moments, factors, out) -> out`; the contract is in `Rule`."""

OPTIONAL_HYPERPARAMETERS = frozenset({"dampening", "nesterov", "weight_decay"})
"""Hyperparameters that `hyper` may lack: they are then zero in all slots, and their passes are skipped."""


@dataclass(frozen=True)
class Rule:
    """An update rule that trains many slots at once.

    `apply(params, grads, moments, prepare(hyper, count), out)` writes the update u_t into `out` and returns it, such
    that theta_t = theta_{t-1} + u_t. All tensors have one floating dtype and one device; none requires grad. What
    `prepare` returns are the factors of the formula, [slots, 1] each, which serve all segments of the parameters.

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
        prepare: from `hyper` and `count`, the factors.
        apply: with them, the update.
        lookahead: whether `grads` is to be taken at `lookahead_point(params, velocity, momentum)`.
    """

    name: str
    moments: tuple[str, ...]
    hyperparameters: tuple[str, ...]
    prepare: Prepare
    apply: Apply
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


def _decay(hyper: Tensors, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors with that of the L2 penalty, if any slot has one."""
    if "weight_decay" in hyper:
        factors["weight_decay"] = hyper["weight_decay"][:, None]
    return factors


def _decayed(params: Tensor, grads: Tensor, factors: Tensors, out: Tensor | None) -> Tensor:
    """The gradient with the L2 penalty's: in `out`, or `grads` itself if no slot decays its weights."""
    if "weight_decay" not in factors:
        return grads
    return torch.addcmul(grads, params, factors["weight_decay"], out=out)


def _prepare_sgd(hyper: Tensors, count: Tensor) -> Tensors:
    momentum, step_size = hyper["momentum"], -hyper["learning_rate"]  # [slots]
    factors = {"momentum": momentum[:, None]}
    if "dampening" in hyper:
        # torch dampens neither the first step nor plain SGD.
        undamped = (count == 1) | (momentum == 0)
        factors["gain"] = torch.where(undamped, 1.0, 1.0 - hyper["dampening"])[:, None]
    if "nesterov" in hyper:
        factors["from_gradient"] = (step_size * hyper["nesterov"])[:, None]
        step_size = torch.where(hyper["nesterov"] == 0, step_size, step_size * momentum)
    factors["from_velocity"] = step_size[:, None]
    return _decay(hyper, factors)


def _sgd(params: Tensor, grads: Tensor, moments: Tensors, factors: Tensors, out: Tensor) -> Tensor:
    # v = momentum v + (1 - dampening) d;  u = -lr v, or -lr (d + momentum v) for Nesterov
    velocity = moments["velocity"]  # [slots, parameters]
    d = _decayed(params, grads, factors, out)  # [slots, parameters]
    if "gain" in factors:
        velocity.mul_(factors["momentum"]).addcmul_(d, factors["gain"])
    else:
        torch.addcmul(d, velocity, factors["momentum"], out=velocity)
    if "from_gradient" not in factors:
        return torch.mul(velocity, factors["from_velocity"], out=out)
    torch.mul(d, factors["from_gradient"], out=out)
    return out.addcmul_(velocity, factors["from_velocity"])


def _prepare_classic(hyper: Tensors, count: Tensor) -> Tensors:
    return _decay(hyper, {name: hyper[name][:, None] for name in ("momentum", "learning_rate")})


def _momentum_classic(params: Tensor, grads: Tensor, moments: Tensors, factors: Tensors, out: Tensor) -> Tensor:
    # v = momentum v + lr d;  u = -v
    velocity = moments["velocity"]  # [slots, parameters]
    d = _decayed(params, grads, factors, out)  # [slots, parameters]
    velocity.mul_(factors["momentum"]).addcmul_(d, factors["learning_rate"])
    return torch.neg(velocity, out=out)


def _nesterov_lookahead(params: Tensor, grads: Tensor, moments: Tensors, factors: Tensors, out: Tensor) -> Tensor:
    # The L2 penalty is part of the objective, so its gradient too is taken at the looked-ahead point.
    if "weight_decay" in factors:
        params = lookahead_point(params, moments["velocity"], factors["momentum"][:, 0], out=out)
    return _momentum_classic(params, grads, moments, factors, out)


def _root_mean_square(square: Tensor, d: Tensor, share: Tensor, out: Tensor) -> Tensor:
    """The root, in `out`, of `square` once this `share` [slots, 1] of d^2 is averaged into it; `d` may be `out`."""
    torch.mul(d, d, out=out)
    square.lerp_(out, share)
    return torch.sqrt(square, out=out)


def _prepare_adam(hyper: Tensors, count: Tensor) -> dict[str, Tensor]:
    # u = -lr (m / c1) / (sqrt(s / c2) + eps) = -lr (sqrt(c2) / c1) m / (sqrt(s) + sqrt(c2) eps)
    beta1, beta2 = hyper["beta1"], hyper["beta2"]  # [slots]
    root_correction2 = (1.0 - beta2**count).sqrt()
    return {
        "first": (1.0 - beta1)[:, None],
        "second": (1.0 - beta2)[:, None],
        "eps": (root_correction2 * hyper["eps"])[:, None],
        "step_size": (-hyper["learning_rate"] * root_correction2 / (1.0 - beta1**count))[:, None],
    }


def _prepare_adam_with_penalty(hyper: Tensors, count: Tensor) -> Tensors:
    return _decay(hyper, _prepare_adam(hyper, count))


def _prepare_adamw(hyper: Tensors, count: Tensor) -> Tensors:
    factors = _prepare_adam(hyper, count)
    if "weight_decay" in hyper:
        factors["shrink"] = (-hyper["learning_rate"] * hyper["weight_decay"])[:, None]
    return factors


def _adam(params: Tensor, grads: Tensor, moments: Tensors, factors: Tensors, out: Tensor) -> Tensor:
    d = _decayed(params, grads, factors, out)  # [slots, parameters]
    first = moments["first_moment"].lerp_(d, factors["first"])
    _root_mean_square(moments["second_moment"], d, factors["second"], out).add_(factors["eps"])
    return torch.div(first, out, out=out).mul_(factors["step_size"])


def _adamw(params: Tensor, grads: Tensor, moments: Tensors, factors: Tensors, out: Tensor) -> Tensor:
    _adam(params, grads, moments, factors, out)
    return out.addcmul_(params, factors["shrink"]) if "shrink" in factors else out


def _prepare_rmsprop(hyper: Tensors, count: Tensor) -> Tensors:
    share, step_size = 1.0 - hyper["alpha"], -hyper["learning_rate"]  # [slots]
    return _decay(hyper, {"share": share[:, None], "eps": hyper["eps"][:, None], "step_size": step_size[:, None]})


def _rmsprop(params: Tensor, grads: Tensor, moments: Tensors, factors: Tensors, out: Tensor) -> Tensor:
    # u = -lr d / (sqrt(s) + eps): out holds the denominator while d is still needed, so d is not kept there.
    d = _decayed(params, grads, factors, None)  # [slots, parameters]
    _root_mean_square(moments["mean_square"], d, factors["share"], out).add_(factors["eps"])
    return torch.div(d, out, out=out).mul_(factors["step_size"])


_HEAVY_BALL = ("learning_rate", "momentum", "weight_decay")
_ADAM = ("learning_rate", "beta1", "beta2", "eps", "weight_decay")
_RMSPROP = ("learning_rate", "alpha", "eps", "weight_decay")

RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule("sgd", ("velocity",), (*_HEAVY_BALL, "dampening", "nesterov"), _prepare_sgd, _sgd),
            Rule("momentum_classic", ("velocity",), _HEAVY_BALL, _prepare_classic, _momentum_classic),
            Rule("nesterov_lookahead", ("velocity",), _HEAVY_BALL, _prepare_classic, _nesterov_lookahead, True),
            Rule("adam", ("first_moment", "second_moment"), _ADAM, _prepare_adam_with_penalty, _adam),
            Rule("adamw", ("first_moment", "second_moment"), _ADAM, _prepare_adamw, _adamw),
            Rule("rmsprop", ("mean_square",), _RMSPROP, _prepare_rmsprop, _rmsprop),
        )
    }
)
"""Update rules by the name that `catalog.OPTIMIZERS` gives them.

- `sgd`: torch.optim.SGD; plain SGD, momentum and Nesterov are values of `momentum` and `nesterov` (0 or 1).
- `momentum_classic`: v = beta v + lr g; theta -= v (Polyak 1964, as in Sutskever et al. 2013).
- `nesterov_lookahead`: the same with g taken at theta - beta v (Nesterov 1983, as in Sutskever et al. 2013).
- `adam`, `adamw`, `rmsprop`: torch.optim.Adam, AdamW and RMSprop (not centred, without momentum).
"""
