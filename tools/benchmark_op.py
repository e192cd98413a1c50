#!/usr/bin/env python
"""Time multi-scale deformable attention beside other implementations, and measure its memory.

::

    python tools/benchmark_op.py --json op.json

What the workloads are and what each column means stands in docs/benchmarks.md. All implementations
are timed in turn in one run, after their results have been compared.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from benchmarking import (
    MEGABYTE,
    KernelTimer,
    Record,
    Run,
    Timer,
    add_options,
    describe,
    environment,
    note,
    peak_gpu_memory,
    peak_memory,
    prepare,
    side_by_side,
    summary,
    table,
    wall_seconds,
    write_json,
)
from torch import Tensor
from tqdm import tqdm

from ddetr_d2.errors import UserError, exit_on_user_error
from ddetr_d2.layers import ms_deform_attn, ms_deform_attn_reference

HEADS, CHANNELS, POINTS = 8, 32, 4
STRIDES = (8, 16, 32, 64)
DECODER_QUERIES = 300
SPREAD = 2.0  # standard deviation of the encoder's sampling points, in pixels of the level
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("time", "memory")
WORKLOADS = ("encoder", "decoder")
PASSES = ("forward", "forward + backward")
OURS = "ddetr_d2"
# Relative errors beyond which something else is computed. The gradients of locations jump at the
# borders of pixels, which rounding puts a few samples on the other side of; and sums of many
# gradients in 16 bits are coarse.
LIMITS = {"float32": 1e-2, "bfloat16": 0.1, "float16": 0.1}
COLUMNS = {
    "workload": "workload",
    "batch": "batch",
    "type": "type",
    "pass": "pass",
    "implementation": "implementation",
    "median_ms": "median ms",
    "fastest_ms": "fastest ms",
    "speedup": "times as fast",
    "bandwidth_share": "share of bandwidth",
    "error": "relative error",
}
MEMORY_COLUMNS = {
    "workload": "workload",
    "batch": "batch",
    "type": "type",
    "implementation": "implementation",
    "extra_mb": "extra memory, MB",
    "extra_per_gradients": "in sizes of the gradients",
}

# Value, locations and weights to the output.
Operator = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One workload, in one size and type."""

    workload: str
    batch: int
    type: str
    image_size: tuple[int, int]
    device: str

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Height and width of each level, in pixels."""
        height, width = self.image_size
        return [(-(-height // stride), -(-width // stride)) for stride in STRIDES]

    @property
    def starts(self) -> list[int]:
        """First token of each level."""
        sizes = [height * width for height, width in self.shapes]
        return [0, *itertools.accumulate(sizes[:-1])]

    def make_inputs(self) -> list[Tensor]:
        """Value (N, S, M, D), locations (N, Q, M, L, K, 2), weights (N, Q, M, L, K)."""
        generator = torch.Generator().manual_seed(0)
        tokens = sum(height * width for height, width in self.shapes)
        levels = len(self.shapes)
        value = torch.randn(self.batch, tokens, HEADS, CHANNELS, generator=generator)
        if self.workload == "encoder":
            sizes = torch.tensor(self.shapes).flip(1)  # width, height
            locations = torch.randn(
                self.batch, tokens, HEADS, levels, POINTS, 2, generator=generator
            )
            locations *= SPREAD / sizes[:, None]
            locations += token_centers(self.shapes)[:, None, None, None]
        else:
            shape = (self.batch, DECODER_QUERIES, HEADS, levels, POINTS, 2)
            locations = torch.rand(shape, generator=generator)
        weights = torch.rand(locations.shape[:-1], generator=generator)
        weights /= weights.sum((-2, -1), keepdim=True)
        inputs = (value, locations, weights)
        return [tensor.to(self.device, TYPES[self.type]) for tensor in inputs]


def token_centers(shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Centre (x, y) of every token as a fraction of the image: (S, 2)."""
    centers = []
    for height, width in shapes:
        y = (torch.arange(height) + 0.5) / height
        x = (torch.arange(width) + 0.5) / width
        centers.append(torch.cartesian_prod(y, x).flip(1))
    return torch.cat(centers)


def _ours(case: Case) -> Operator:
    return lambda value, *rest: ms_deform_attn(value, case.shapes, case.starts, *rest)


def _reference(case: Case) -> Operator:
    return lambda value, *rest: ms_deform_attn_reference(value, case.shapes, case.starts, *rest)


def _grid_sample(case: Case) -> Operator:
    from transformers.models.deformable_detr import modeling_deformable_detr

    function = modeling_deformable_detr.MultiScaleDeformableAttention()
    shapes, starts = (torch.tensor(x, device=case.device) for x in (case.shapes, case.starts))
    return lambda value, *rest: function(value, shapes, case.shapes, starts, *rest, 64)


def _deformops(case: Case) -> Operator:
    from deformops.registry import msda

    shapes, starts = (torch.tensor(x, device=case.device) for x in (case.shapes, case.starts))
    # The backend, and the type it sums in, are its own choice for this GPU.
    return lambda value, *rest: msda(value, shapes, starts, *rest, method="linear")


IMPLEMENTATIONS = {
    OURS: _ours,
    "grid_sample": _grid_sample,
    "deformops": _deformops,
    "reference": _reference,
}
# How to get what does not come with this project.
PACKAGES = {"grid_sample": "transformers", "deformops": "deformops (Python 3.12 or 3.13)"}


def present(names: Sequence[str], case: Case) -> list[str]:
    """Those of the implementations that are installed."""
    found = []
    for name in names:
        try:
            IMPLEMENTATIONS[name](case)
            found.append(name)
        except ImportError as error:
            note(f"{name} is left out: {error}; pip install {PACKAGES[name]} brings it.")
    return found


def forward(operator: Operator, inputs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return operator(*inputs)


def forward_backward(
    operator: Operator, inputs: Sequence[Tensor], grad_output: Tensor
) -> list[Tensor]:
    """Output and gradients, which go nowhere else."""
    output = operator(*inputs)
    return [output, *torch.autograd.grad(output, inputs, grad_output)]


def with_gradients(case: Case) -> tuple[list[Tensor], Tensor]:
    """Inputs that gradients are wanted of, and the gradient of the output."""
    value, locations, weights = (tensor.requires_grad_() for tensor in case.make_inputs())
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, locations.shape[1], HEADS * CHANNELS)
    grad_output = torch.randn(shape, generator=generator).to(value)
    return [value, locations, weights], grad_output


def errors(case: Case, names: Sequence[str]) -> dict[str, float]:
    """The largest relative error, of norms, among the output and the three gradients of each.

    Measured against the formulation in plain PyTorch, in float32, with the same numbers.
    Implementations that compute something else are left out.
    """
    inputs, grad_output = with_gradients(case)
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = forward_backward(_reference(case), exact, grad_output.float())
    found = {}
    for name in names:
        got = forward_backward(IMPLEMENTATIONS[name](case), inputs, grad_output)
        parts = [
            (tensor.detach().float() - right).norm() / right.norm()
            for tensor, right in zip(got, expected, strict=True)
        ]
        error = torch.stack(parts).max().item()  # NaN if one of them is
        if error <= LIMITS[case.type]:
            found[name] = error
        elif name in (OURS, "reference"):
            raise RuntimeError(f"{name} is wrong in {case}: relative error {error:.2g}")
        else:
            note(
                f"{name} is left out of {case.workload}, batch {case.batch}, {case.type}: its "
                f"results are wrong, by a relative error of {error:.2g}."
            )
    return found


def traffic(case: Case) -> dict[str, int]:
    """Bytes of what each pass reads and writes if it does so once."""
    inputs, grad_output = with_gradients(case)
    read = sum(tensor.nbytes for tensor in inputs)
    once = read + grad_output.nbytes  # the output is as large as its gradient
    return {PASSES[0]: once, PASSES[1]: once + read + once}


def copy_bandwidth(device: str, timer: Timer) -> float:
    """Bytes per second that are read and written by the copy of a large tensor."""
    source = torch.zeros(1 << (30 if device == "cuda" else 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source).copy_(source)
    times = [timer(lambda: target.copy_(source)) for _ in range(10)]
    return 2 * source.nbytes / statistics.median(times)


def time_case(
    case: Case, names: Sequence[str], rounds: int, timer: Timer, bandwidth: float, progress: tqdm
) -> list[Record]:
    """Median durations of both passes of each implementation."""
    inputs, grad_output = with_gradients(case)
    operators = {name: IMPLEMENTATIONS[name](case) for name in names}
    runs: dict[str, dict[str, Run]] = {
        PASSES[0]: {n: lambda f=f: forward(f, inputs) for n, f in operators.items()},
        PASSES[1]: {
            n: lambda f=f: forward_backward(f, inputs, grad_output) for n, f in operators.items()
        },
    }
    records = []
    least = traffic(case)
    for name_of_pass, functions in runs.items():
        times = side_by_side(functions, rounds, progress, timer, seconds=0.2)
        medians = {name: statistics.median(values) for name, values in times.items()}
        base = medians.get("grid_sample", medians.get("reference"))
        for name in names:
            records.append(
                {
                    **described(case),
                    "pass": name_of_pass,
                    "implementation": name,
                    **summary(times[name]),
                    "speedup": base and base / medians[name],
                    "bandwidth_share": least[name_of_pass] / medians[name] / bandwidth,
                }
            )
    return records


def described(case: Case) -> Record:
    return {"workload": case.workload, "batch": case.batch, "type": case.type}


def prepare_memory_run(case: Case, name: str) -> Run:
    """Forward and backward of one implementation, after a small run that loads what it needs."""
    operator = IMPLEMENTATIONS[name]
    small = Case("decoder", 1, case.type, (64, 64), case.device)
    forward_backward(operator(small), *with_gradients(small))
    inputs, grad_output = with_gradients(case)
    return lambda: forward_backward(operator(case), inputs, grad_output)


def memory_case(case: Case, names: Sequence[str], progress: tqdm) -> list[Record]:
    """Peak memory beyond the inputs, the output and the output's gradient."""
    inputs, grad_output = with_gradients(case)
    gradients, output = sum(tensor.nbytes for tensor in inputs), grad_output.nbytes
    del inputs, grad_output
    records = []
    for name in names:
        if case.device == "cuda":
            measured = peak_gpu_memory(prepare_memory_run(case, name))
        else:
            measured = peak_memory(prepare_memory_run, case, name)
        progress.update()
        extra = None if measured is None else measured[0] - output
        records.append(
            {
                **described(case),
                "implementation": name,
                "extra_mb": extra if extra is None else extra / MEGABYTE,
                "extra_per_gradients": extra if extra is None else extra / gradients,
            }
        )
    return records


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    add_options(parser)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument(
        "--workloads", nargs="+", choices=WORKLOADS, default=WORKLOADS, metavar="NAME"
    )
    parser.add_argument(
        "--batch", nargs="+", type=int, metavar="N", help="(default: 1 2; on a GPU 8 as well)"
    )
    parser.add_argument(
        "--types",
        nargs="+",
        choices=TYPES,
        metavar="TYPE",
        help=f"of all tensors: {', '.join(TYPES)} (default: all; the last on a GPU alone)",
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        metavar="NAME",
        help=f"any of {', '.join(IMPLEMENTATIONS)} (default: all; deformops on a GPU alone)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    gpu = args.device == "cuda"
    batches = args.batch or ([1, 2, 8] if gpu else [1, 2])
    prepare(args, batch=batches)
    cases = [
        Case(workload, batch, type_name, tuple(args.image_size), args.device)
        for workload in args.workloads
        for batch in batches
        for type_name in args.types or [name for name in TYPES if gpu or name != "float16"]
    ]
    # On a CPU deformops is the grid_sample formulation as well.
    usual = [name for name in IMPLEMENTATIONS if gpu or name != "deformops"]
    names = present(args.implementations or usual, cases[0])
    if not names:
        raise UserError("--implementations: none of them is installed.")

    report: Record = {"environment": environment(args.device), "time": [], "memory": []}
    timer = KernelTimer() if gpu else wall_seconds
    bandwidth = copy_bandwidth(args.device, timer)
    report["bandwidth_gb_per_s"] = bandwidth / 1e9
    rounds, parts = args.repetitions, args.parts
    turns = 2 * rounds * ("time" in parts) + ("memory" in parts)  # of one implementation
    with tqdm(total=len(cases) * len(names) * turns, unit="turn", file=sys.stderr) as progress:
        for case in cases:
            progress.set_description(f"{case.workload} {case.batch} {case.type}")
            found = errors(case, names)
            progress.update((len(names) - len(found)) * turns)
            if "time" in parts:
                records = time_case(case, list(found), rounds, timer, bandwidth, progress)
                report["time"] += [{**x, "error": found[x["implementation"]]} for x in records]
            if "memory" in parts:
                report["memory"] += memory_case(case, list(found), progress)

    print(describe(report["environment"]))
    if report["time"]:
        print(f"A copy moves {report['bandwidth_gb_per_s']:.3g} GB/s.")
        print(table("Time", report["time"], COLUMNS))
    if report["memory"]:
        print(table("Memory of forward + backward", report["memory"], MEMORY_COLUMNS))
    write_json(args.json, report)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
