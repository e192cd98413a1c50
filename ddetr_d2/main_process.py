"""Decisions that the main process of a run takes for all of its processes."""

from collections.abc import Callable
from typing import Any, TypeVar

from detectron2.utils import comm

from .errors import UserError

T = TypeVar("T")


def on_main_process(function: Callable[[], T]) -> T:
    """Call ``function`` in the main process and give its result to every process.

    All processes must call this. The result is pickled where there are several.

    Raises:
        UserError: in every process, if ``function`` raises it.
    """
    result: Any = None
    error: UserError | None = None
    if comm.is_main_process():
        try:
            result = function()
        except UserError as raised:
            error = raised
    if comm.get_world_size() > 1:
        result, message = comm.all_gather((result, error and str(error)))[0]
        if message and error is None:
            error = UserError(message)
    if error:
        raise error
    return result
