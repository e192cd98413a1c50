"""The checkpoints in the folder of a run, and which of them a run continues from."""

import logging
import os
import re

from ..errors import UserError
from .whole_files import find_damage, read_lazily

# Names the newest checkpoint, as in every folder of Detectron2.
LAST_CHECKPOINT = "last_checkpoint"
# Checkpoints written every so many iterations; the number is the last iteration that was done.
PERIODIC = re.compile(r"model_(\d{7,})\.pth")
_CHECKPOINT = re.compile(r"model_(\d{7,}|final|best)\.pth")


def has_checkpoint(folder: str) -> bool:
    """Whether a run has left a checkpoint in ``folder``, or a trace of one."""
    return os.path.exists(os.path.join(folder, LAST_CHECKPOINT)) or bool(_names(folder))


def newest_checkpoint(folder: str) -> str:
    """Path of the checkpoint that a run in ``folder`` continues from; empty if it has none.

    That is the one ``last_checkpoint`` names, and where it is damaged or gone the newest whole
    one, with a warning. Files are read to the end to know that they are whole.

    Raises:
        UserError: if none is whole.
    """
    if not has_checkpoint(folder):
        return ""
    named, reason = _named_last(folder)
    damaged = {}
    if named:
        damage = find_damage(os.path.join(folder, named))
        if not damage:
            return os.path.join(folder, named)
        damaged[named] = damage
        reason = f"names {named}, which {damage}"
    others = [(_iteration(os.path.join(folder, n)), n) for n in _names(folder) if n != named]
    for iteration, name in sorted(others, reverse=True):
        damage = find_damage(os.path.join(folder, name))
        if damage:
            damaged[name] = damage
            continue
        skipped = [f"{other} {damage}" for other, damage in damaged.items() if other != named]
        logging.getLogger(__name__).warning(
            f"{os.path.join(folder, LAST_CHECKPOINT)} {reason}; resuming from {name} (iteration "
            f"{iteration}), the newest that is whole{': ' if skipped else ''}{', '.join(skipped)}."
        )
        return os.path.join(folder, name)
    found = ", ".join(f"{name} {damage}" for name, damage in damaged.items())
    raise UserError(
        f"no checkpoint in {folder} can be resumed: {found or f'{LAST_CHECKPOINT} {reason}'}. "
        "Copy a whole one into the folder, or start anew: another OUTPUT_DIR, without --resume."
    )


def _names(folder: str) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if _CHECKPOINT.fullmatch(name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _named_last(folder: str) -> tuple[str, str]:
    """The file that ``last_checkpoint`` names, or else what is wrong with it."""
    try:
        with open(os.path.join(folder, LAST_CHECKPOINT), encoding="utf-8") as file:
            name = file.read().strip()
    except FileNotFoundError:
        return "", "does not exist"
    except (OSError, UnicodeDecodeError):
        return "", "cannot be read"
    if not name:
        return "", "is empty"
    if not name.isprintable():
        return "", "is damaged"
    if os.path.basename(name) != name or name in (os.curdir, os.pardir):
        return "", f"names {name}, which is not in the folder"
    return name, ""


def _iteration(path: str) -> int:
    """The last iteration that was done when a checkpoint was written; -1 where it does not tell."""
    match = PERIODIC.fullmatch(os.path.basename(path))
    if match:
        return int(match[1])
    try:
        return int(read_lazily(path)["iteration"])
    except Exception:  # damaged or foreign: reading it fails in many ways
        return -1
