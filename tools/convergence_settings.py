"""The conditions of a comparison, and how long its members train."""

from dataclasses import dataclass

from ddetr_d2.errors import UserError

from convergence_members import MEMBERS

# When a run is evaluated, in intervals: densely at first, then ever less so.
_EVALUATIONS = (*range(1, 11), *range(12, 21, 2), *range(25, 51, 5), *range(60, 1001, 10))
# Settings that may change from one call to the next: runs that are there already are continued.
MAY_CHANGE = ("iterations", "baseline_factor")


@dataclass(frozen=True)
class Settings:
    """What all runs of a folder have in common.

    Attributes:
        iterations: training steps of each member; there has to be an evaluation after them.
        baseline_factor: how many times as many the baseline trains.
        interval: iterations from one evaluation to the next at the start.
        rates: learning rates of the search, ascending, two or more; none for no search.
        search_iterations: training steps of each run of the search.
        search_extensions: how many further rates the search may try, where the best is the
            highest or the lowest so far.
        baseline_search_factor: how many times as many they are for the baseline.
        train_images: number of training images.
        val_images: number of images that are evaluated on.
        image_size: width and height of the images in pixels.
        max_objects: most objects in an image.
        backbone_steps: of the training of the backbone.
    """

    iterations: int = 1000
    baseline_factor: int = 10
    interval: int = 100
    rates: tuple[float, ...] = (0.0001, 0.0003, 0.001)
    search_iterations: int = 400
    search_extensions: int = 2
    baseline_search_factor: int = 10
    train_images: int = 4000
    val_images: int = 250
    image_size: int = 256
    max_objects: int = 3
    backbone_steps: int = 300

    def __post_init__(self) -> None:
        times = [self.interval * count for count in _EVALUATIONS]
        for iterations in (self.iterations, self.iterations * self.baseline_factor):
            if iterations not in times:
                below = [i for i in times if i < iterations][-1:]
                above = [i for i in times if i > iterations][:1]
                raise UserError(
                    f"there is no evaluation after {iterations} iterations, only after "
                    f"{' and '.join(map(str, below + above))}: give another --iterations."
                )

    def budget(self, member: str) -> int:
        """Iterations that ``member`` trains."""
        return self.iterations * (self.baseline_factor if MEMBERS[member].is_baseline else 1)

    def search_budget(self, member: str) -> int:
        """Iterations of each run of the search for ``member``."""
        factor = self.baseline_search_factor if MEMBERS[member].is_baseline else 1
        return self.search_iterations * factor

    def evaluations(self, iterations: int) -> list[int]:
        """When a run of so many iterations is evaluated."""
        times = (self.interval * count for count in _EVALUATIONS)
        return [i for i in times if i <= iterations]
