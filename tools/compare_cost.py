#!/usr/bin/env python
"""Compare the cost of dense and deformable attention over the size of the image.

::

    python tools/compare_cost.py --output output/cost

measures time and memory of one encoder layer and of the whole model (ResNet-50), in inference and
in forward + backward, and writes cost.json, cost.md (tables with the fitted exponents) and cost.png
into the folder. Figures that are there already are kept: what was interrupted goes on, and larger
sizes can be added. What is measured, and how, stands in docs/convergence.md.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for benchmarks

from ddetr_d2.checkpoint.whole_files import whole_file
from ddetr_d2.errors import UserError, exit_on_user_error

from cost_cases import MEMBERS, PARTS, PASSES, build, case, peak_bytes
from cost_figures import QUANTITIES, draw, rows_of, series, tables

from benchmarks.memory import MEGABYTE
from benchmarks.report import Record, describe, environment, note
from benchmarks.timing import Run, in_turns, wall_seconds

SHORT_SIDES = (256, 352, 480, 640, 864, 1184, 1600)
ASPECT = 4 / 3
# Share of the free memory that a size may take as predicted from the smaller ones.
MEMORY_SHARE = 0.6
# Conditions without which earlier figures are not kept.
COMPARABLE = ("device", "instructions", "threads", "torch", "options")


def predicted(sizes: Sequence[float], values: Sequence[float], size: float) -> float | None:
    """What ``size`` will take, by the power law through the last two values; None if there is none.

    The exponent is held between 0 and 2; with a single value it is 1.
    """
    if not values:
        return None
    power = 1.0
    if len(values) > 1:
        power = math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])
    return values[-1] * (size / sizes[-1]) ** min(max(power, 0.0), 2.0)


def predicted_from_smaller(
    sizes: Sequence[float], values: Sequence[float], size: float
) -> float | None:
    """As :func:`predicted`, by sizes below this one; ``sizes`` rise."""
    count = sum(x < size for x in sizes)
    return predicted(sizes[:count], values[:count], size)


def free_bytes(device: str) -> float:
    """Memory that is free; infinite where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))


def processor_seconds(function: Run) -> float:
    """Time that the processor works on one call, whatever else it does in between."""
    start = time.process_time()
    function()
    return time.process_time() - start


class Comparison:
    """Measures part by part, from the smallest size to the largest.

    Attributes:
        records: one for each part, pass, member and size, with what was measured.
        left_out: sentences on what was not.
    """

    def __init__(self, device: str, rounds: int, minutes: float, opts: Sequence[str] = ()):
        """
        Args:
            device: ``cpu`` or ``cuda``.
            rounds: times that each is timed.
            minutes: sizes that are predicted to end later than this after the start are left out.
            opts: changes to the configurations.
        """
        self.models = {member: build(member, device, opts) for member in MEMBERS}
        self.device = device
        self.rounds = rounds
        self.end = time.monotonic() + minutes * 60
        self.timer = wall_seconds if device == "cuda" else processor_seconds
        self.records: list[Record] = []
        self.left_out: list[str] = []

    def run(
        self, parts: Sequence[str], short_sides: Sequence[int], keep: Callable[[], None]
    ) -> None:
        """Measure what is not in the records yet.

        Args:
            parts: of :data:`PARTS`.
            short_sides: in pixels, rising.
            keep: called after each size, when there is more in the records.
        """
        rows = [(part, pass_, side) for part in parts for side in short_sides for pass_ in PASSES]
        with tqdm(
            total=len(rows) * len(MEMBERS) * self.rounds, unit="turn", file=sys.stderr
        ) as bar:
            for index, (part, pass_, side) in enumerate(rows):
                left = sum(self._predicted_row(*row) for row in rows[index:])
                bar.set_description(f"{part}, {side}")
                bar.set_postfix_str(f"about {left / 60:.0f} min left" if left else "")
                self._measure_row(part, pass_, side, bar)
                keep()

    def _predicted_row(self, part: str, pass_: str, side: int) -> float:
        """Seconds by the clock that a row will take: zero where nothing is known or left to do."""
        if not self.records:
            return 0.0
        work = 0.0
        for member in self.models:
            sizes, seconds = series(self.records, part, pass_, member, "seconds")
            if pixels_of(side) not in sizes:
                work += predicted_from_smaller(sizes, seconds, pixels_of(side)) or 0.0
        # The processor's time scatters less than the clock's, which other programs share.
        per_work = sum(x["wall_seconds"] for x in self.records)
        return work * per_work / sum(x["seconds"] for x in self.records)

    def _measure_row(self, part: str, pass_: str, side: int, bar: tqdm) -> None:
        start = time.monotonic()
        late = start + self._predicted_row(part, pass_, side) > self.end
        functions, memory = {}, {}
        for member, model in self.models.items():
            reason = self._reason_against(part, pass_, member, side, late)
            if reason is not None:
                bar.update(self.rounds)
                if reason:
                    label = MEMBERS[member].label
                    self.left_out.append(f"{part}, {pass_}, {label}: {side} is left out, {reason}.")
                    note(self.left_out[-1])
                continue
            functions[member] = case(model, part, pass_, size_of(side))
            # The first call, which is not timed.
            memory[member] = peak_bytes(functions[member], self.device) / MEGABYTE
        times = in_turns(functions, self.rounds, self.timer, bar.update)
        height, width = size_of(side)
        for member, seconds in times.items():
            self.records.append(
                {
                    "part": part,
                    "pass": pass_,
                    "member": member,
                    "height": height,
                    "width": width,
                    "pixels": pixels_of(side),
                    "seconds": statistics.median(seconds),
                    "all_seconds": seconds,
                    "megabytes": memory[member],
                    # Of its size in all, by the clock.
                    "wall_seconds": (time.monotonic() - start) / len(times),
                }
            )

    def _reason_against(
        self, part: str, pass_: str, member: str, side: int, late: bool
    ) -> str | None:
        """Why something is not measured, empty if it has been before; None if it can be."""
        sizes, values = series(self.records, part, pass_, member, "megabytes")
        pixels = pixels_of(side)
        if pixels in sizes:
            return ""
        if late:
            return "it would end later than --minutes"
        needed = predicted_from_smaller(sizes, values, pixels) or 0
        if needed * MEGABYTE > MEMORY_SHARE * free_bytes(self.device):
            return f"it would need about {needed * MEGABYTE / 1e9:.0f} GB"
        return None


def size_of(side: int) -> tuple[int, int]:
    """Height and width of an image with this short side, in pixels."""
    return side, round(side * ASPECT)


def pixels_of(side: int) -> int:
    height, width = size_of(side)
    return height * width


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where results go")
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=usual, help=f"(default: {usual})"
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads on the CPU (default: 1)"
    )
    parser.add_argument(
        "--repetitions", type=int, default=3, metavar="N", help="turns of each (default: 3)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument(
        "--short-sides",
        nargs="+",
        type=int,
        default=SHORT_SIDES,
        metavar="PIXELS",
        help=f"of images of 4:3 (default: {' '.join(map(str, SHORT_SIDES))})",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=60.0,
        metavar="N",
        help="leave out sizes that would end later than this (default: 60)",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes to all configurations, as in: --opts MODEL.DEFORMABLE_DETR.HIDDEN_DIM 128",
    )
    return parser


def check(args: argparse.Namespace) -> Path:
    """Check the options and make the folder for the results.

    Raises:
        UserError: one of them is out of range, or the folder cannot be made.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no usable GPU is here; take --device cpu.")
    for option, values in (
        ("--threads", [args.threads]),
        ("--repetitions", [args.repetitions]),
        ("--minutes", [args.minutes]),
    ):
        if min(values) < 1:
            raise UserError(f"{option} is {min(values):g}; it must be at least 1.")
    if min(args.short_sides) < 32:
        raise UserError(f"--short-sides {min(args.short_sides)}: give 32 pixels or more.")
    folder = Path(args.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; give another folder.") from error
    return folder


def read(path: Path, machine: Record) -> Record:
    """What an earlier run has left in the file: empty if there is none.

    Raises:
        UserError: the file is none of this program, or its figures are not comparable.
    """
    if not path.exists():
        return {"records": []}
    try:
        report = json.loads(path.read_text())
        before = {key: report["environment"][key] for key in COMPARABLE}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read; remove it, or give another --output.") from error
    differing = [key for key in COMPARABLE if before[key] != machine[key]]
    if differing:
        listed = ", ".join(f"{key} {before[key]}, now {machine[key]}" for key in differing)
        raise UserError(
            f"{path} has figures under other conditions ({listed}); give another --output."
        )
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    folder = check(args)
    torch.set_num_threads(args.threads)
    machine = environment(args.device) | {"options": args.opts}
    path = folder / "cost.json"
    earlier = read(path, machine)
    comparison = Comparison(args.device, args.repetitions, args.minutes, args.opts)
    comparison.records += earlier["records"]
    records = comparison.records

    def keep() -> None:
        exponents = [
            {"part": row["part"], "pass": row["pass"], "member": row["member"]}
            | {"quantity": quantity, "exponent": row["exponent"]}
            for quantity in QUANTITIES
            for row in rows_of(records, quantity)
        ]
        report = {"environment": machine, "records": records, "exponents": exponents}
        text = json.dumps(report | {"left_out": comparison.left_out}, indent=2)
        with whole_file(str(path)) as file:
            file.write(text.encode())

    comparison.run([x for x in PARTS if x in args.parts], sorted(set(args.short_sides)), keep)
    text = "\n".join([describe(machine), tables(records), "", *comparison.left_out]).rstrip()
    print(text)
    (folder / "cost.md").write_text(text + "\n")
    draw(records, folder / "cost.png")
    print(f"\nwrote cost.json, cost.md and cost.png to {folder}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
