"""Work of a GPU that is recorded once and then given to it by a single launch."""

from collections.abc import Callable
from typing import TypeVar

from ddetr_d2.errors import UserError

import torch

WARM_UP_CALLS = 3
T = TypeVar("T")


def record(function: Callable[[], T]) -> tuple[Callable[[], None], T]:
    """Record a CUDA graph.

    Args:
        function: what is recorded. It must not wait for the GPU.

    Returns:
        a function that does the work again, and the tensors into which that writes its results.

    Raises:
        UserError: the function does something that cannot be recorded.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_CALLS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = function()
    except RuntimeError as error:
        raise UserError(f"it cannot be recorded as a CUDA graph: {error}") from error
    return graph.replay, outputs
