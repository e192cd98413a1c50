"""The training runs of a comparison: which there are, in which order, and what they have found."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ddetr_d2.checkpoint.whole_files import whole_file
from ddetr_d2.data.shapes import SPLITS
from ddetr_d2.data.synthetic import make_synthetic
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError

from convergence_backbone import train_backbone
from convergence_curves import Curve, read_curve
from convergence_members import MEMBERS
from convergence_settings import MAY_CHANGE, Settings

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILE = ROOT / "configs" / "convergence.yaml"
PROGRAM = ROOT / "tools" / "convergence_training.py"


@dataclass(frozen=True)
class Run:
    """One training run, up to a number of iterations."""

    member: str
    rate: float
    seed: int
    iterations: int

    @property
    def name(self) -> str:
        """Of its folder. Runs that differ in iterations only continue one another."""
        return f"{self.member}/rate-{self.rate:g}/seed-{self.seed}"


class Comparison:
    """A folder with the runs of a comparison.

    Attributes:
        folder: ``settings.json``, ``data/``, ``backbones/`` and ``runs/`` are in it.
        settings: of all runs.
    """

    def __init__(self, folder: Path, settings: Settings):
        """
        Raises:
            UserError: the folder holds a comparison with other settings, or cannot be written.
        """
        self.folder = folder
        self.settings = settings
        content = asdict(settings) | {"config": CONFIG_FILE.read_text()}
        content = json.loads(json.dumps(content))
        path = folder / "settings.json"
        if path.exists():
            _check_same(json.loads(path.read_text()), content, folder)
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}.") from error
        with whole_file(str(path)) as file:
            file.write(json.dumps(content, indent=1).encode())

    def curve(self, run: Run) -> Curve:
        """What the run, or a longer or shorter one of the same name, has found so far."""
        return read_curve(self.folder / "runs" / run.name / "metrics.json")

    def is_finished(self, run: Run) -> bool:
        """Whether the run has come to its last evaluation."""
        return run.iterations in self.curve(run).iterations

    def search(self, member: str) -> list[Run]:
        """The runs that choose the learning rate of ``member``; none without a search.

        While the best rate is the highest or the lowest one, a further one is added beyond it.
        """
        member = MEMBERS[member].rate_of or member
        rates = self.settings.rates
        if not rates:
            return []
        iterations = self.settings.search_budget(member)
        for extensions in itertools.count():
            runs = [Run(member, rate, 0, iterations) for rate in rates]
            found = [self.curve(run).at("AP", iterations) for run in runs]
            if None in found or extensions == self.settings.search_extensions:
                return runs
            best = found.index(max(found))
            if best == 0:
                rates = (_one_digit(rates[0] ** 2 / rates[1]), *rates)
            elif best == len(rates) - 1:
                rates = (*rates, _one_digit(rates[-1] ** 2 / rates[-2]))
            else:
                return runs

    def rate(self, member: str) -> float | None:
        """Learning rate of ``member``: the one of the highest AP, None while that is unknown."""
        runs = self.search(member)
        if not runs:
            return MEMBERS[member].rate
        found = {run.rate: self.curve(run).at("AP", run.iterations) for run in runs}
        if None in found.values():
            return None
        return max(found, key=lambda rate: found[rate])

    def full_run(self, member: str, seed: int) -> Run | None:
        """The whole run of a member, None while its learning rate is unknown."""
        rate = self.rate(member)
        if rate is None:
            return None
        return Run(member, rate, seed, self.settings.budget(member))

    def todo(self, members: Sequence[str], seeds: int) -> tuple[list[Run], list[tuple[str, int]]]:
        """The runs that can be done now, first ones first, and the others by member and seed."""
        searched = dict.fromkeys(run for member in members for run in self.search(member))
        ready = [run for run in searched if not self.is_finished(run)]
        waiting = []
        for seed in range(seeds):
            for member in members:
                run = self.full_run(member, seed)
                if run is None:
                    waiting.append((member, seed))
                elif not self.is_finished(run):
                    ready.append(run)
        return ready, waiting

    def prepare(self, seeds: Iterable[int]) -> None:
        """Draw the images and train the backbones that are missing."""
        settings = self.settings
        make_synthetic(
            self.folder / "data",
            settings.train_images,
            settings.val_images,
            min_size=settings.image_size,
            max_size=settings.image_size,
            max_objects=settings.max_objects,
        )
        for split in SPLITS:
            self._write_as_one_class(split)
        for seed in seeds:
            output = self._backbone(seed)
            if output.exists():
                continue
            print(f"Backbone of seed {seed}: learns to classify single objects", flush=True)
            output.parent.mkdir(exist_ok=True)
            accuracy = train_backbone(
                setup_cfg(str(CONFIG_FILE)),
                self.folder / "data" / "train.json",
                self.folder / "data" / "train",
                output,
                seed=seed,
                steps=settings.backbone_steps,
            )
            print(f"    {accuracy:.0%} of the objects are classified rightly", flush=True)

    def _annotations(self, split: str) -> Path:
        return self.folder / "data" / f"{split}_one_class.json"

    def _write_as_one_class(self, split: str) -> None:
        """Annotations in which every shape is of the same class, so that less is to be learned."""
        content = json.loads((self.folder / "data" / f"{split}.json").read_text())
        content["categories"] = [{"id": 1, "name": "shape"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = 1
        with whole_file(str(self._annotations(split))) as file:
            file.write(json.dumps(content).encode())

    def _backbone(self, seed: int) -> Path:
        return self.folder / "backbones" / f"seed-{seed}.pth"

    def command(self, run: Run) -> list[str]:
        """The command line of a run; the same again continues it."""
        sets = [
            [
                f"shapes_{split}",
                str(self._annotations(split).resolve()),
                str((self.folder / "data" / split).resolve()),
            ]
            for split in SPLITS
        ]
        options = {
            "DATASETS.COCO_FORMAT": sets,
            "OUTPUT_DIR": str((self.folder / "runs" / run.name).resolve()),
            "MODEL.WEIGHTS": str(self._backbone(run.seed).resolve()),
            "SEED": run.seed,
            "SOLVER.BASE_LR": run.rate,
            "SOLVER.MAX_ITER": run.iterations,
            "SOLVER.CHECKPOINT_PERIOD": self.settings.interval,
        } | MEMBERS[run.member].options
        pairs = [str(word) for pair in options.items() for word in pair]
        times = map(str, self.settings.evaluations(run.iterations))
        return [
            *(sys.executable, str(PROGRAM), "--evaluate-at", *times),
            *("--config-file", str(CONFIG_FILE), "--resume", *pairs),
        ]


def _one_digit(value: float) -> float:
    """``value``, rounded to its first digit."""
    return float(f"{value:.0e}")


def _check_same(old: dict, new: dict, folder: Path) -> None:
    for key in new:
        if old.get(key) == new[key] or key in MAY_CHANGE:
            continue
        if key == "config":
            raise UserError(
                f"{folder} holds a comparison made with another {CONFIG_FILE.name}: give another "
                "--output."
            )
        raise UserError(
            f"{folder} holds a comparison with {key} {old.get(key)}, and now it is {new[key]}: "
            "give the same options, or another --output."
        )


def run_all(
    comparison: Comparison,
    members: Sequence[str],
    seeds: int,
    jobs: int,
    after_run: Callable[[Run, float], None],
) -> None:
    """Do all runs that are not finished, ``jobs`` at a time.

    Args:
        comparison: prepared.
        members: names.
        seeds: how many, from 0.
        jobs: how many runs at a time.
        after_run: called with each finished run and the seconds it took.

    Raises:
        UserError: a run has failed, or was stopped from outside.
    """
    active: dict[Run, tuple[subprocess.Popen, float]] = {}
    try:
        while True:
            ready, waiting = comparison.todo(members, seeds)
            names = {run.name for run in active}  # a search and its continuation share a folder
            for run in [r for r in ready if r.name not in names][: jobs - len(active)]:
                active[run] = _start(comparison, run), time.monotonic()
            if not active:
                return
            while all(process.poll() is None for process, _ in active.values()):
                time.sleep(0.2)
            for run, (process, start) in list(active.items()):
                if process.poll() is None:
                    continue
                del active[run]
                if process.returncode:
                    raise UserError(_failure(comparison, run, process.returncode))
                after_run(run, time.monotonic() - start)
    finally:
        for process, _ in active.values():
            process.terminate()  # it writes a checkpoint and ends
        for process, _ in active.values():
            process.wait()


def _start(comparison: Comparison, run: Run) -> subprocess.Popen:
    folder = comparison.folder / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    # In a session of its own, so that Ctrl-C reaches it once, from here.
    with open(folder / "output.txt", "a") as file:
        return subprocess.Popen(
            comparison.command(run),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ,
        )


def _failure(comparison: Comparison, run: Run, code: int) -> str:
    output = comparison.folder / "runs" / run.name / "output.txt"
    if code == 75:
        return f"the run {run.name} was stopped from outside: continue with the same command."
    lines = output.read_text(errors="replace").strip().splitlines()
    return f"the run {run.name} ended with exit code {code}; its output is in {output}: " + (
        lines[-1] if lines else "nothing"
    )
