"""What this process holds in memory."""

import gc

from torch import Tensor
from torch._subclasses import FakeTensor


def live_tensors() -> list[Tensor]:
    """All tensors but those without memory, which torch's compiler keeps from the tests before."""
    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), Tensor) and not issubclass(type(t), FakeTensor)]
