"""Types that sums and positions are computed in."""

import torch
from torch import Tensor


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for types of 16 bits, other floating types as they are.

    ``torch.promote_types`` would do, but export records it as an operator, at which torch.compile
    then cuts the graph.
    """
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def at_least_float(x: Tensor) -> Tensor:
    """16 bit numbers as float32, others as they are."""
    return x.to(at_least_float32(x.dtype))
