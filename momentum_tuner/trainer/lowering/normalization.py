"""`batch_norm` of images, or lines, whose examples lie innermost, as of one example with all their pixels."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from momentum_tuner.trainer.lowering.convolution import lies_examples_innermost


def lower_batch_norm(x: Any, *args: Any, **kwargs: Any) -> Any:
    """`batch_norm` after a lowered convolution: the mean is over examples and pixels, however they are told apart.

    Returns NotImplemented for images that lie otherwise.
    """
    if not isinstance(x, Tensor) or not lies_examples_innermost(x.unsqueeze(2) if x.ndim == 3 else x):
        return NotImplemented
    pixels = x.movedim(0, -1)
    out: Tensor = functional.batch_norm(pixels.flatten(1)[None], *args, **kwargs)
    return out.squeeze(0).view(pixels.shape).movedim(-1, 0)
