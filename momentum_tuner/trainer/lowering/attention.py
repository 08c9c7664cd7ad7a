"""Attention in products and a softmax: what `nn.MultiheadAttention` and the Transformer layers call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from momentum_tuner.trainer.lowering.softmax import FEW

Drop = Callable[[Tensor, float], Tensor]


def lower_attention(
    drop: Drop,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`scaled_dot_product_attention`; NotImplemented with grouped queries."""
    if enable_gqa:
        return NotImplemented
    rows_may_be_masked = attn_mask is not None
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        nothing = torch.zeros((), dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, nothing, -math.inf)
    return _attend(drop, query, key, value, attn_mask, dropout_p, scale, rows_may_be_masked)[0]


def _attend(
    drop: Drop,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None = None,
    rows_may_be_masked: bool = False,
) -> tuple[Tensor, Tensor]:
    """The values `[..., L, E]` that the weights `[..., L, S]` choose, and the weights.

    Of a row that is masked altogether they are 0 if `rows_may_be_masked`, as in torch's kernels, and otherwise NaN.
    """
    some = None
    if mask is not None and rows_may_be_masked:
        some = (mask > -math.inf).any(-1, keepdim=True)
        mask = mask.clamp_min(torch.finfo(mask.dtype).min / 2)
    query = query * (scale if scale is not None else query.shape[-1] ** -0.5)
    if key.shape[-2] < FEW and query.device.type == "cpu":  # as in `softmax`, but here it costs nothing
        turned = key @ query.mT  # [..., S, L]
        weights = torch.softmax(turned if mask is None else turned + mask.mT, -2).mT
    else:
        scores = query @ key.mT
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
    weights = weights if some is None else weights * some
    weights = drop(weights, dropout) if dropout > 0.0 else weights
    return weights @ value, weights


def lower_multi_head_attention(
    drop: Drop,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """`multi_head_attention_forward`; NotImplemented with what few use: extra keys, static ones, no batch.

    Query, key and value are `[length, batch, features]`.
    """
    rare = (bias_k, bias_v, static_k, static_v)
    if query.ndim != 3 or add_zero_attn or any(one is not None for one in rare) or (is_causal and attn_mask is None):
        return NotImplemented
    batch = query.shape[1]
    projected = _project(
        (query, key, value),
        (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight,
        in_proj_bias,
    )
    # [batch, heads, length, features of a head]
    q, k, v = (one.view(len(one), batch, num_heads, -1).permute(1, 2, 0, 3) for one in projected)
    mask = _added(attn_mask, query.dtype)
    if mask is not None and mask.ndim == 3:
        mask = mask.view(batch, num_heads, *mask.shape[1:])
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, query.dtype)
        assert padding is not None
        padding = padding[:, None, None, :]
        mask = padding if mask is None else mask + padding
    out, weights = _attend(drop, q, k, v, mask, dropout_p if training else 0.0, rows_may_be_masked=not need_weights)
    out = linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def _project(sources: tuple[Tensor, ...], weights: Any, bias: Tensor | None) -> tuple[Tensor, ...]:
    """Query, key and value, by one product where they are the same and their weights lie together, else by three."""
    query, key, value = sources
    if isinstance(weights, Tensor) and query is key and key is value:
        return linear(query, weights, bias).chunk(3, -1)
    parts = weights.chunk(3) if isinstance(weights, Tensor) else weights
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return tuple(linear(source, part, one) for source, part, one in zip(sources, parts, biases, strict=True))


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What a mask adds to the scores: minus infinity where it says True."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.where(mask, -math.inf, torch.zeros((), dtype=dtype, device=mask.device))
