#!/usr/bin/env python
"""Train for 2,000 steps on tiny images and see whether any process of the run grows.

::

    python tools/soak.py --output output/soak

train_net.py runs as it does for users: with data workers, evaluations, checkpoints of which the
oldest are removed, the best checkpoint and a moving average of the weights. Twice a second the
resident memory of each of its processes is read from /proc. The exit code is 1 if that of one of
them is more than 5% higher after the last step than after step 200.

Each process is judged by its resident set (Rss), with the pages of libraries and of the process it
was forked from, which it shares with others. Shown beside them, but not judged, is the sum of the
proportional sets of anonymous memory (Pss_Anon), in which a page that n of them share counts 1/n
in each: what the run takes from the machine. It rises as well, up to the size of what was shared,
when a worker writes to pages that it shared before.

Linux only.
"""

import argparse
import csv
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
from ddetr_d2.data.synthetic import make_synthetic
from ddetr_d2.errors import UserError, exit_on_user_error

import matplotlib.pyplot as plt
from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
CONFIG_FILE = ROOT / "configs" / "synthetic_demo.yaml"
ALL = "all together (Pss_Anon)"
# oneDNN keeps what it has prepared for each new size of images, 1,024 entries by default. They come
# over thousands of steps and would hide a leak; a few are enough to see that old ones go.
CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
# A model with all the parts of a large one, on images of many sizes.
TINY = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16"),
    *("MODEL.DEFORMABLE_DETR.HIDDEN_DIM", "64"),
    *("MODEL.DEFORMABLE_DETR.DIM_FEEDFORWARD", "128"),
    *("MODEL.DEFORMABLE_DETR.ENC_LAYERS", "1"),
    *("MODEL.DEFORMABLE_DETR.DEC_LAYERS", "2"),
    *("MODEL.DEFORMABLE_DETR.DROPOUT", "0.1"),
    *("INPUT.MIN_SIZE_TRAIN", "(64, 80, 96)"),
    *("INPUT.MIN_SIZE_TEST", "96"),
    *("SOLVER.IMS_PER_BATCH", "4"),
    *("SOLVER.CHECKPOINTS_KEPT", "2"),
    *("SOLVER.KEEP_BEST", "True"),
    *("SOLVER.EMA.ENABLED", "True"),
    *("SEED", "1"),
]


@dataclass(frozen=True)
class Sample:
    """Memory of one process at one moment.

    Attributes:
        step: steps done.
        name: of the process, the same throughout the run.
        rss: resident set, in MB.
        anonymous: the part of it that belongs to no file, in MB.
        proportional: the same, pages shared by n processes counted 1/n in each, in MB.
    """

    step: int
    name: str
    rss: float
    anonymous: float
    proportional: float


@dataclass(frozen=True)
class Growth:
    """Memory in MB after an early and a late step."""

    name: str
    early: float
    late: float

    @property
    def share(self) -> float:
        """Growth as a share of the early memory."""
        return self.late / self.early - 1


def judge(samples: Iterable[Sample], early: int, late: int, window: int) -> list[Growth]:
    """Compare the memory after two steps, each the median over the ``window`` steps after it.

    Args:
        samples: those of one moment follow each other and have distinct names.
        early: step of the first memory.
        late: step of the second.
        window: steps, short enough that the two do not overlap.

    Returns:
        one for each process that lived at both times, and one for :data:`ALL`, the sum.

    Raises:
        UserError: there are no samples at one of the two times.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    for moment in _moments(samples):
        for end, start in enumerate((early, late)):
            if not start <= moment[0].step < start + window:
                continue
            memory = {sample.name: sample.rss for sample in moment}
            memory[ALL] = sum(sample.proportional for sample in moment)
            for name, value in memory.items():
                found.setdefault(name, ([], []))[end].append(value)
    if not all(found.get(ALL, ([], []))):
        raise UserError(
            f"the run was too quick to be measured after step {early} and after step {late}; give "
            "more --steps, a longer --window, or a shorter --interval."
        )
    return [
        Growth(name, *map(statistics.median, values))
        for name, values in found.items()
        if all(values)
    ]


def _moments(samples: Iterable[Sample]) -> Iterable[list[Sample]]:
    moment: list[Sample] = []
    names: set[str] = set()
    for sample in samples:
        if sample.name in names:
            yield moment
            moment, names = [], set()
        moment.append(sample)
        names.add(sample.name)
    if moment:
        yield moment


class Processes:
    """A process and all that descend from it, with names that stay."""

    def __init__(self, root: int):
        """
        Args:
            root: its process id.
        """
        self._root = root
        self._names: dict[int, str] = {}
        self._numbers: dict[str, itertools.count] = {}

    def sample(self, step: int) -> list[Sample]:
        """Memory of the processes that there are now."""
        children: dict[int, list[int]] = {}
        parents: dict[int, int] = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                stat = (entry / "stat").read_text()
            except OSError:  # it has just ended
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.name))
            parents[int(entry.name)] = parent
        samples, todo = [], [self._root]
        while todo:
            pid = todo.pop(0)
            todo += sorted(children.get(pid, ()))
            try:
                memory = _read_memory(pid)
                name = self._name(pid, parents.get(pid, 0))
            except OSError:  # it has just ended
                continue
            if memory:
                samples.append(Sample(step, name, *memory))
        return samples

    def _name(self, pid: int, parent: int) -> str:
        if pid == self._root:
            return "main process"
        if pid not in self._names:
            words = Path(f"/proc/{pid}/cmdline").read_text()
            if words == Path(f"/proc/{parent}/cmdline").read_text():
                kind = "data worker"  # forked
            else:
                kind = "training process" if "spawn_main" in words else "helper process"
            number = next(self._numbers.setdefault(kind, itertools.count(1)))
            self._names[pid] = f"{kind} {number}"
        return self._names[pid]


def _read_memory(pid: int) -> tuple[float, float, float] | None:
    """Rss, Anonymous and Pss_Anon in MB; None for a process that has ended."""
    values = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, number, *_ = line.split()
        values[key.rstrip(":")] = int(number) * 1024 / 1e6
    if not values:
        return None
    return values["Rss"], values["Anonymous"], values["Pss_Anon"]


def steps_done(metrics: Path) -> int:
    """Steps that a run has written to its metrics.json; it does so every 20."""
    try:
        lines = metrics.read_text().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        try:
            return json.loads(line)["iteration"] + 1
        except (json.JSONDecodeError, KeyError):  # not written to its end yet
            continue
    return 0


def run_training(args: argparse.Namespace, output: Path) -> list[Sample]:
    """Train in processes of their own and read their memory until they end.

    Raises:
        UserError: the training fails.
    """
    data = output / "data"
    make_synthetic(data, train=200, val=8, min_size=96, max_size=160)
    sets = [
        [f"shapes_{split}", f"{data}/{split}.json", f"{data}/{split}"] for split in ("train", "val")
    ]
    total = args.steps + args.window
    # The first evaluation comes before the early step, the last one after the late step.
    period = max(args.early * 3 // 4, 1)
    samples: list[Sample] = []
    with (
        tempfile.TemporaryDirectory(prefix="soak_") as folder,
        open(output / "training.txt", "w") as log,
    ):
        options = [
            *TINY,
            *("DATASETS.COCO_FORMAT", json.dumps(sets)),
            *("DATALOADER.NUM_WORKERS", str(args.workers)),
            *("SOLVER.MAX_ITER", str(total)),
            *("SOLVER.CHECKPOINT_PERIOD", str(period)),
            *("TEST.EVAL_PERIOD", str(period)),
            *("OUTPUT_DIR", folder),
            *args.opts,
        ]
        several = ["--num-processes", str(args.num_processes)] if args.num_processes > 1 else []
        command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(CONFIG_FILE)]
        environment = {**CACHES, **os.environ}
        training = subprocess.Popen(
            [*command, *several, *options], stdout=log, stderr=log, env=environment
        )
        processes = Processes(training.pid)
        try:
            with tqdm(total=total, unit="step", smoothing=0.02) as progress:
                while training.poll() is None:
                    step = steps_done(Path(folder, "metrics.json"))
                    moment = processes.sample(step)
                    samples += moment
                    progress.set_postfix_str(f"{sum(s.proportional for s in moment):.0f} MB")
                    progress.update(step - progress.n)
                    time.sleep(args.interval)
        finally:
            training.terminate()  # nothing, if it has ended
            training.wait()
    if training.returncode:
        raise UserError(f"the training ended with exit code {training.returncode}; see {log.name}.")
    return samples


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """Write all samples as CSV."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(Sample))
        writer.writerows(
            [round(x, 3) if isinstance(x, float) else x for x in astuple(sample)]
            for sample in samples
        )


def plot(samples: Sequence[Sample], growth: Sequence[Growth], path: Path) -> None:
    """Draw memory over steps, of the processes that are judged and of all together."""
    figure, axes = plt.subplots(figsize=(9, 4.5), constrained_layout=True)
    for entry in growth:
        if entry.name == ALL:
            moments = [*_moments(samples)]
            x = [moment[0].step for moment in moments]
            y = [sum(sample.proportional for sample in moment) for moment in moments]
        else:
            own = [sample for sample in samples if sample.name == entry.name]
            x, y = [sample.step for sample in own], [sample.rss for sample in own]
        axes.plot(x, y, label=entry.name, color="black" if entry.name == ALL else None, linewidth=1)
    axes.set_xlabel("training steps")
    axes.set_ylabel("resident memory, MB")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", default="output/soak", help="folder of the results")
    parser.add_argument("--steps", type=int, default=2000, help="the late step")
    parser.add_argument("--early", type=int, default=200, help="the early step")
    parser.add_argument(
        "--window", type=int, default=100, help="steps after each over which a median is taken"
    )
    parser.add_argument("--limit", type=float, default=0.05, help="share that memory may grow")
    parser.add_argument("--workers", type=int, default=2, help="data workers of each process")
    parser.add_argument("--num-processes", type=int, default=1, help="training processes")
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between samples")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="configuration of the training"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code: 1 if memory has grown."""
    args = get_parser().parse_args(arguments)
    if not 1 <= args.window <= args.steps - args.early or args.early < 1:
        raise UserError(
            f"--early {args.early}, --steps {args.steps}, --window {args.window}: the late step "
            "has to lie a window or more after the early one."
        )
    if not Path("/proc/self/smaps_rollup").exists():
        raise UserError("this program reads the memory of processes from /proc, as Linux has it.")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    samples = run_training(args, output)
    write_samples(samples, output / "memory.csv")
    growth = judge(samples, args.early, args.steps, args.window)
    plot(samples, growth, output / "memory.png")
    rows = [(x.name, f"{x.early:.1f}", f"{x.late:.1f}", f"{100 * x.share:+.1f}%") for x in growth]
    heads = ("MB", f"after step {args.early}", f"after step {args.steps}", "growth")
    print(tabulate(rows, heads, "github", colalign=("left", "right", "right", "right")))
    print(f"wrote memory.csv, memory.png and training.txt to {output}")
    grown = [x.name for x in growth if x.name != ALL and x.share > args.limit]
    if grown:
        print(f"more than {100 * args.limit:g}% growth: {', '.join(grown)}", file=sys.stderr)
    return int(bool(grown))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the training ends as well
    with exit_on_user_error():
        sys.exit(main())
