"""What becomes of images that cannot be used: counted, listed, and too many end the run."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .wording import counted

logger = logging.getLogger(__name__)

_NAMED = 3  # images named in an error message


class UnreadableImage(NamedTuple):
    """An image that could not be used, and why."""

    path: str
    reason: str


class UnreadableImages:
    """The images of a training set that turned out to be missing, damaged or of another size.

    Each is logged once, and listed once in a file. :meth:`agree` stops the run when there are too
    many.

    Attributes:
        pending: images found by this process that the others do not know of yet.
    """

    def __init__(self, images: int, max_share: float, file: str | Path | None = None) -> None:
        """
        Args:
            images: number of different images in the training set.
            max_share: share of them that may be unreadable. Unless it is 0, one always may.
            file: list of them, a path and a reason on each line; None for no file.

        Raises:
            UserError: ``max_share`` is no share.
        """
        if not 0 <= max_share <= 1:
            raise UserError(f"DATALOADER.MAX_UNREADABLE is {max_share}: give a share from 0 to 1")
        self.pending: list[UnreadableImage] = []
        self._images = images
        self._max_share = max_share
        self._limit = max(1, int(max_share * images)) if max_share else 0
        self._file = None if file is None else Path(file)
        self._reasons: dict[str, str] = {}

    def __len__(self) -> int:
        """The number of different images that could not be used so far."""
        return len(self._reasons)

    def found(self, images: Iterable[UnreadableImage]) -> None:
        """Note images that this process could not use; those known already are passed over."""
        self.pending += self._add(images)

    def agree(self, all_gather: Callable[[list], list[list]]) -> None:
        """Let all processes know what each has found, and stop all of them if it is too much.

        To be called by every process in the same step.

        Args:
            all_gather: returns the argument of each process, such as Detectron2's
                ``comm.all_gather``.

        Raises:
            UserError: more images are unreadable than may be.
        """
        pending, self.pending = self.pending, []
        for images in all_gather(pending):
            self._add(images)
        self.check()

    def check(self) -> None:
        """
        Raises:
            UserError: more images are unreadable than may be.
        """
        if len(self) <= self._limit:
            return
        reasons = [*self._reasons.values()]
        named = "; ".join(reasons[:_NAMED])
        if len(reasons) > _NAMED:
            named += f"; and {len(reasons) - _NAMED} more"
            named += f", listed in {self._file}" if self._file else ""
        raise UserError(
            f"{len(self)} of the {counted(self._images, 'training image')} cannot be used, "
            f"DATALOADER.MAX_UNREADABLE ({self._max_share:g}) allows {self._limit}: {named}. Mend "
            "them, take them out of the data set, or allow more"
        )

    def state_dict(self) -> dict[str, str]:
        """The images and reasons so far."""
        return dict(self._reasons)

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Continue from :meth:`state_dict`."""
        self._reasons = dict(state)

    def start_list(self) -> None:
        """Make the file list what is known now, in place of what an earlier run left there."""
        if self._file is None:
            return
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"cannot replace {self._file}: {error.strerror}") from error
        self._append(self._reasons.items())

    def _add(self, images: Iterable[UnreadableImage]) -> list[UnreadableImage]:
        new = []
        for image in images:
            if image.path not in self._reasons:
                self._reasons[image.path] = image.reason
                new.append(image)
                logger.warning("%s; another image takes its place whenever it is due", image.reason)
        self._append(new)
        return new

    def _append(self, images: Iterable[tuple[str, str]]) -> None:
        lines = [f"{path}\t{' '.join(reason.split())}\n" for path, reason in images]
        if self._file is None or not lines:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(lines)
        except OSError as error:
            raise UserError(f"cannot write {self._file}: {error.strerror}") from error
