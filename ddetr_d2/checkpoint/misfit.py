"""Whether weights fit a model, and how to say that they do not."""

import re
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

from .names import State

# Parts of a backbone that ImageNet weights do not have.
_BEYOND_IMAGENET = ("conv2_offset", "fpn_", "top_block")
# Lines of each kind in the table of what does not fit.
_MAX_LINES = 6


@dataclass
class Misfit:
    """What does not fit: names, or names with the shapes in the file and in the model."""

    missing: list[str]
    left_over: list[str]
    wrong: dict[str, tuple[list[int], list[int]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.left_over or self.wrong)

    def summary(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} parameters are missing, the first {self.missing[0]}")
        if self.wrong:
            name, (in_file, in_model) = next(iter(self.wrong.items()))
            parts.append(
                f"{len(self.wrong)} differ in shape, the first {name}: {in_file} in the file, "
                f"{in_model} in the model"
            )
        if self.left_over:
            parts.append(f"{len(self.left_over)} are left over, the first {self.left_over[0]}")
        return "; ".join(parts)

    def table(self) -> str:
        """A line for each kind of name, counted."""
        rows = [("", "tensors", "name", "in the file", "in the model")]
        rows += _grouped("missing", {name: ("", "") for name in self.missing})
        rows += _grouped("other shape", self.wrong)
        rows += _grouped("left over", {name: ("", "") for name in self.left_over})
        return tabulate(rows, tablefmt="plain")


def _grouped(kind: str, entries: dict[str, tuple[Any, Any]]) -> list[tuple[Any, ...]]:
    """Count names that differ in numbers and in the last part only."""
    groups: dict[str, list[str]] = {}
    for name in entries:
        module = re.sub(r"\.\d+(?=\.|$)", ".*", name.rpartition(".")[0]) or name
        groups.setdefault(module, []).append(name)
    rows = []
    for module, names in list(groups.items())[:_MAX_LINES]:
        if len(names) == 1:
            module = names[0]
        elif len({name.rpartition(".")[2] for name in names}) == 1:
            module += "." + names[0].rpartition(".")[2]
        else:
            module += ".*"
        rows.append((kind, len(names), module, *map(str, entries[names[0]])))
        kind = ""
    rest = sum(len(names) for names in list(groups.values())[_MAX_LINES:])
    if rest:
        rows.append(("", rest, "others", "", ""))
    return rows


def compare(state: State, expected: State, backbone_only: bool) -> Misfit:
    """Compare weights with what the model has, leaving out counters of training steps.

    Args:
        state: the weights.
        expected: ``state_dict()`` of the model.
        backbone_only: the weights need to hold no more than a backbone's, of ImageNet.
    """
    missing = [name for name in expected if name not in state and not _is_counter(name)]
    left_over = [name for name in state if name not in expected and not _is_counter(name)]
    if backbone_only:
        missing = [
            name
            for name in missing
            if name.startswith("backbone.") and not any(x in name for x in _BEYOND_IMAGENET)
        ]
        # Stages that the model does not have may stay behind, blocks of its stages may not.
        blocks = {_block(name) for name in expected}
        stages = {stage for stage, _ in blocks}
        left_over = [n for n in left_over if _block(n) not in blocks and _block(n)[0] in stages]
    wrong = {
        name: (list(state[name].shape), list(tensor.shape))
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    }
    return Misfit(missing, left_over, wrong)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _block(name: str) -> tuple[str, str]:
    """``("res2", "0")`` of ``backbone.res2.0.conv1.weight``; nothing for other names."""
    match = re.match(r"backbone\.(?:bottom_up\.)?(res\d)\.(\d+)\.", name)
    return (match[1], match[2]) if match else ("", "")
