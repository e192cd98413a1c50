"""Errors that a user can cause and mend, and how the programs report them."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Something in the user's arguments, configuration or files is wrong.

    The message is one sentence or two for the user: the thing, its value and the remedy.
    """

    def __init__(self, message: str) -> None:
        # A data loader raises its worker's error again with the worker's traceback as the
        # message; the user's part is what follows the error's name at the end of it.
        super().__init__(message.rpartition(f"{__name__}.UserError: ")[2].rstrip())


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a :class:`UserError` as one ``error: ...`` line on stderr and exit with code 2.

    Other exceptions pass through with their traceback: they are defects, not user errors.
    """
    try:
        yield
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def nearest(word: str, words: Iterable[str]) -> str:
    """``"; did you mean ...?"`` with the one of ``words`` most like ``word``, or nothing."""
    by_folded = {w.lower(): w for w in words}
    found = difflib.get_close_matches(word.lower(), list(by_folded), n=1, cutoff=0.5)
    return f"; did you mean {by_folded[found[0]]}?" if found else ""
