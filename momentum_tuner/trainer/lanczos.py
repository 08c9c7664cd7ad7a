"""The largest eigenvalues of several symmetric matrices at once, each known only by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TOLERANCE = 0.01
"""No eigenvalue is larger than the one found by more than this share of it, but with the probability `MISS`."""
MISS = 0.01
MOST_PRODUCTS = 200
_SMALLEST = 1e-3
"""Of the largest magnitude in the spectrum: an eigenvalue nearer to zero is found to a share of that."""


def largest_eigenvalues(
    multiply: Callable[[Tensor], Tensor], like: Tensor, pause: Callable[[], bool] = lambda: False
) -> NDArray[np.float64] | None:
    """The largest eigenvalue of each matrix; not the largest in magnitude, which may be a negative one.

    By the Lanczos iteration in the form of Paige (1972), from a random vector that is the same every time. Its vectors
    lose their orthogonality, of which the largest eigenvalue takes no harm, so that no more than two of them are kept.
    What it finds is never too large. It stops when a larger eigenvalue would have shown by now, unless the random
    vector had next to nothing of its direction (the probabilistic bound of van Dorsselaer, Hochstenbach and van der
    Vorst 2000): a small residual alone may belong to the second largest.

    Args:
        multiply: of vectors `[matrices, size]` the products with the matrices, in the same shape.
        like: `[matrices, size]`; the vectors have its dtype and device.
        pause: asked before each product.

    Returns:
        `[matrices]`; NaN for a matrix that is not finite or took more than `MOST_PRODUCTS`; None after a pause.
    """
    matrices, size = like.shape
    wide = torch.promote_types(like.dtype, torch.float32)
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = (start / start.norm()).to(like.device, wide).expand(matrices, -1)
    before, link = torch.zeros_like(direction), torch.zeros(matrices, dtype=wide, device=like.device)
    diagonal: list[NDArray[np.float64]] = []  # [matrices] for each product
    links: list[NDArray[np.float64]] = []
    found = np.full(matrices, np.nan)
    searching = np.full(matrices, True)
    for _ in range(MOST_PRODUCTS):
        if pause():
            return None
        image = multiply(direction.to(like.dtype)).to(wide) - link[:, None] * before
        along = (image * direction).sum(1)
        image = image - along[:, None] * direction
        link = torch.linalg.vector_norm(image, dim=1)
        before, direction = direction, image / torch.where(link > 0, link, 1.0)[:, None]
        column = torch.stack((along, link)).to("cpu", torch.float64).numpy()
        searching &= np.isfinite(column).all(0)
        diagonal.append(np.where(searching, column[0], 0.0))
        links.append(np.where(searching, column[1], 0.0))
        largest, settled = _look(diagonal, links, size)
        found = np.where(searching & settled, largest, found)
        searching &= ~settled
        if not searching.any():
            break
    return found


def _look(
    diagonal: Sequence[NDArray[np.float64]], links: Sequence[NDArray[np.float64]], size: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """The largest eigenvalue of each tridiagonal matrix, and whether the search may end with it, `[matrices]` each."""
    below = np.stack(links, axis=1)  # [matrices, products]
    count = below.shape[1]
    tridiagonal = np.zeros((*below.shape, count))
    at = np.arange(count)
    tridiagonal[:, at, at] = np.stack(diagonal, axis=1)
    tridiagonal[:, at[1:], at[:-1]] = below[:, :-1]  # the lower triangle is all that counts
    values = np.linalg.eigvalsh(tridiagonal)
    largest = values[:, -1]
    limit = largest + TOLERANCE * np.maximum(np.abs(largest), _SMALLEST * np.abs(values).max(axis=1))
    # The start's share of an eigenvector of eigenvalue x is at most prod(links) / prod(x - values).
    with np.errstate(divide="ignore", invalid="ignore"):
        grown = np.log(limit[:, None] - values).sum(1) - np.log(below).sum(1)
    return largest, (grown > math.log(math.sqrt(size) / MISS)) | (below[:, -1] == 0.0)
