#!/usr/bin/env python
"""Train DETR and Deformable DETR under the same conditions, and draw how fast each learns.

::

    python tools/compare_convergence.py                      # hours
    python tools/compare_convergence.py --quick              # a first picture in minutes
    python tools/compare_convergence.py --ablation           # points, levels, attention across them
    python tools/compare_convergence.py detr deformable      # the members to compare

The data are synthetic shapes. ``convergence.png``, ``.md`` and ``.json`` (``ablation...`` with
``--ablation``) appear in the output folder and are rewritten after every run. The same command
again goes on where it was. docs/convergence.md says what is compared and how.
"""

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError, exit_on_user_error

from convergence_curves import Curve
from convergence_figures import draw
from convergence_members import ABLATION, DEFAULT, MEMBERS, check_members
from convergence_runs import CONFIG_FILE, Comparison, Run, run_all
from convergence_settings import Settings
from convergence_tables import Results, write_tables

QUICK_MEMBERS = ("detr", "deformable-single-scale", "deformable-refine")
QUICK = Settings(iterations=600, baseline_factor=5, rates=(), train_images=2000, backbone_steps=200)


def collect(comparison: Comparison, members: Sequence[str], seeds: int) -> Results:
    """The finished runs of ``members``."""
    curves: dict[str, dict[int, Curve]] = {}
    searches, rates = {}, {}
    for member in members:
        runs = [comparison.full_run(member, seed) for seed in range(seeds)]
        finished = [run for run in runs if run and comparison.is_finished(run)]
        if not finished:
            continue
        curves[member] = {run.seed: comparison.curve(run).until(run.iterations) for run in finished}
        rates[member] = finished[0].rate
        if not MEMBERS[member].rate_of:
            searches[member] = {
                run.rate: comparison.curve(run).at("AP", run.iterations)
                for run in comparison.search(member)
            }
    batch = setup_cfg(str(CONFIG_FILE)).SOLVER.IMS_PER_BATCH
    settings = comparison.settings
    return Results(
        curves, searches, rates, settings.iterations, settings.train_images / batch, seeds
    )


class Progress:
    """Says after each run how far the comparison is, and redraws its picture and tables."""

    def __init__(self, comparison: Comparison, members: Sequence[str], seeds: int, stem: str):
        self._comparison = comparison
        self._members = members
        self._seeds = seeds
        self.stem = stem
        self._start = time.monotonic()
        self._done = 0  # iterations
        self._left = self._iterations_left()

    def after_run(self, run: Run, seconds: float) -> None:
        left = self._iterations_left()
        self._done += self._left - left
        self._left = left
        elapsed = time.monotonic() - self._start
        found = self._comparison.curve(run).at("AP", run.iterations)
        print(
            f"{run.name}: AP {found:.1f} after {run.iterations} iterations, in "
            f"{seconds / 60:.1f} min. Runs left: {self._runs_left()}, about "
            f"{elapsed / max(self._done, 1) * left / 60:.0f} min",
            flush=True,
        )
        self.draw()

    def draw(self) -> bool:
        """Write picture and tables; False if no run of the members is finished."""
        results = collect(self._comparison, self._members, self._seeds)
        if not results.curves:
            return False
        folder = self._comparison.folder
        write_tables(results, folder, self.stem)
        draw(results, folder / f"{self.stem}.png")
        return True

    def _runs_left(self) -> int:
        ready, waiting = self._comparison.todo(self._members, self._seeds)
        return len(ready) + len(waiting)

    def _iterations_left(self) -> int:
        ready, waiting = self._comparison.todo(self._members, self._seeds)
        left = sum(
            run.iterations - max(self._comparison.curve(run).iterations, default=0) for run in ready
        )
        return left + sum(self._comparison.settings.budget(member) for member, _ in waiting)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Settings()
    parser.add_argument(
        "members",
        nargs="*",
        metavar="MEMBER",
        help=f"default: {' '.join(DEFAULT)}; there are "
        f"also {', '.join(name for name in MEMBERS if name not in DEFAULT)}",
    )
    parser.add_argument("--ablation", action="store_true", help="compare " + " ".join(ABLATION))
    parser.add_argument(
        "--quick", action="store_true", help="few iterations of few members, one seed, no search"
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="folder (default: output/convergence, with --quick output/convergence_quick)",
    )
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 3, with --quick 1)")
    parser.add_argument(
        "--iterations",
        type=int,
        help="of each member, of the baseline "
        f"{defaults.baseline_factor} times as many (default: {defaults.iterations})",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time; OMP_NUM_THREADS sets the threads of each (default: %(default)s)",
    )
    parser.add_argument("--draw-only", action="store_true", help="train nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program on ``arguments`` (default: those of the command line).

    Raises:
        UserError: something the user can mend.
    """
    args = _parser().parse_args(arguments)
    members = tuple(args.members)
    check_members(members)
    if members and args.ablation:
        raise UserError("name members or give --ablation, not both.")
    if not members:
        members = ABLATION if args.ablation else QUICK_MEMBERS if args.quick else DEFAULT
    seeds = args.seeds if args.seeds is not None else 1 if args.quick else 3
    for name, value in (("--seeds", seeds), ("--jobs", args.jobs)):
        if value < 1:
            raise UserError(f"{name} {value}: give 1 or more.")
    settings = QUICK if args.quick else Settings()
    if args.iterations is not None:
        settings = replace(settings, iterations=args.iterations)
    folder = args.output or Path("output/convergence_quick" if args.quick else "output/convergence")
    comparison = Comparison(folder, settings)
    if not args.draw_only:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs are stopped on the way out
        comparison.prepare(range(seeds))
    progress = Progress(comparison, members, seeds, "ablation" if args.ablation else "convergence")
    if not args.draw_only:
        try:
            run_all(comparison, members, seeds, args.jobs, progress.after_run)
        except KeyboardInterrupt:
            print("Stopped; the same command goes on from here.")
            sys.exit(130)
    if not progress.draw():
        raise UserError(f"{folder} has no finished run of these members to draw.")
    print(f"wrote {folder}/{progress.stem}.png, .md and .json")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
