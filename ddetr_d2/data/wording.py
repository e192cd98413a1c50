"""Counts in messages."""

_SINGULAR = {"are": "is", "have": "has", "reach": "reaches"}


def plural(count: int, one: str, many: str | None = None) -> str:
    """The word that goes with a count: ``one``, or ``many``, which is ``one`` + s as a rule."""
    return one if count == 1 else many or f"{one}s"


def counted(count: int, one: str, many: str | None = None) -> str:
    """The count and its word: ``"1 image"``, ``"1,000 images"``."""
    return f"{count:,} {plural(count, one, many)}"


def agreeing(count: int, words: str) -> str:
    """Words about several things, the first of them a verb, as they are for ``count`` things.

    ``"are empty"`` becomes ``"is empty"`` if the count is 1.
    """
    verb, _, rest = words.partition(" ")
    return f"{_SINGULAR.get(verb, f'{verb}s')} {rest}".rstrip() if count == 1 else words
