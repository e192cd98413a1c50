"""Classes are matched by their names, between weights, training sets and test sets."""

import unicodedata
from collections import Counter
from collections.abc import Sequence


def match_classes(names: Sequence[str], others: Sequence[str]) -> list[int | None]:
    """For each of ``names`` the index of the same class in ``others``; None where it lacks it.

    Names are the same if they are equal, or else if they differ in case, spaces, underscores or
    Unicode form only and no further name does.
    """
    exact = {name: index for index, name in enumerate(others)}
    ours, theirs = Counter(map(_folded, names)), Counter(map(_folded, others))
    folded = {_folded(name): index for index, name in enumerate(others)}

    def find(name: str) -> int | None:
        key = _folded(name)
        if name in exact or ours[key] > 1 or theirs[key] > 1:
            return exact.get(name)
        return folded.get(key)

    return [find(name) for name in names]


def listed(names: Sequence[str]) -> str:
    """The first ten names, for messages."""
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _folded(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())
