"""The CUDA kernels compute the right numbers, shown without a GPU.

Their very sources run on a CPU (``cuda_on_cpu.h``), with one thread of the operating system for
each of CUDA's and the sanitizers watching memory, integer overflow and races between the threads of
a block. Blocks run one after the other: races between blocks, and speed, are left to a GPU.
"""

import itertools
import shutil
import struct
import subprocess
from pathlib import Path

from ddetr_d2.layers import ms_deform_attn_reference

import pytest
import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "ddetr_d2" / "layers" / "csrc"
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RACES = ("-fsanitize=thread",)
OPTIONS = {  # of the sanitizers; leaks cannot be looked for in a container
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
TYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
TOLERANCE = dict(zip(TYPES, (1e-5, 1e-12, 1e-2, 1e-2), strict=True))
# Value's type and that of locations and weights.
PAIRS = [(dtype, dtype) for dtype in TYPES] + [(dtype, torch.float32) for dtype in TYPES[2:]]
LEVELS = [(4, 8), (5, 7), (3, 1), (1, 1), (2, 3)]
BORDERS = [-1e30, -9, -1, -0.75, -0.5, 0, 3, 3.5, 6.5, 7, 7.25, 8, 9, 1e30]  # in pixels


def compile_cuda(source: Path, program: Path, *options: str) -> Path:
    """Build `source`, which includes cuda_on_cpu.h."""
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths("cpu")]
    command = ["g++", "-std=c++20", "-O1", "-g1", "-w", "-pthread", f"-I{CSRC}", f"-I{HERE}"]
    command += [*includes, *options, str(source), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=OPTIONS, timeout=120)


def skip_without(folder: Path, *options: str) -> None:
    """Skip unless the compiler is there and what it makes with `options` runs here."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    source, program = folder / "trivial.cpp", folder / "trivial"
    source.write_text("#include <barrier>\nint main() { std::barrier one(1); }\n")
    command = ["g++", "-std=c++20", *options, str(source), "-o", str(program)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip(f"g++ cannot compile C++20 with {' '.join(options)}")
    if run(program).returncode != 0:
        pytest.skip(f"programs compiled with {' '.join(options)} do not run here")


@pytest.fixture(scope="session")
def memory_checked(tmp_path_factory) -> Path:
    """The kernels as for a GPU of compute capability 9.0, under the address sanitizer."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    skip_without(folder, *MEMORY)
    return compile_cuda(
        HERE / "cuda_on_cpu.cpp", folder / "memory", *MEMORY, "-DTEST_CUDA_ARCH=900"
    )


@pytest.fixture(scope="session")
def race_checked(tmp_path_factory) -> Path:
    """The kernels as for a GPU of compute capability 8.0, under the thread sanitizer."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    skip_without(folder, *RACES)
    return compile_cuda(HERE / "cuda_on_cpu.cpp", folder / "races", *RACES, "-DTEST_CUDA_ARCH=800")


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def make_inputs(dtype, location_dtype, batch, queries, heads, channels, shapes, points):
    """Value, locations (outside, on borders, not finite), weights, the output's gradient, and
    reference points and boxes, for locations and weights being offsets and logits."""
    generator = torch.Generator().manual_seed(channels)

    def random(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    tokens = sum(height * width for height, width in shapes)
    size = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*size, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    # The sizes of level 0 are powers of two, so that its borders are exact in all types.
    pixels = torch.tensor(BORDERS, dtype=torch.float64) + 0.5
    border = torch.cartesian_prod(pixels / shapes[0][1], pixels / shapes[0][0])
    chosen = torch.randint(len(border), size[:3] + (points,), generator=generator)
    even = torch.arange(queries) % 2 == 0
    locations[:, even, :, 0] = border[chosen][:, even]
    for query, odd in enumerate((float("nan"), float("inf"), -float("inf"))):
        locations[-1, query % queries, -1, -1, -1, query % 2] = odd
    boxes = torch.rand(batch, queries, len(shapes), 4, generator=generator, dtype=torch.float64)
    boxes = boxes.to(torch.promote_types(dtype, torch.float32))
    return (
        random(batch, tokens, heads, channels).to(dtype),
        locations.to(location_dtype),
        random(*size).to(location_dtype),
        random(batch, queries, heads * channels).to(dtype),
        boxes[..., :2],
        boxes,
    )


def run_kernels(program, folder, threads, most_blocks, shapes, inputs):
    """Forward's outputs (of locations, and of offsets from points and from boxes), and backward's
    three gradients without and with `in_order`."""
    value, locations, weights, grad_output, _, _ = inputs
    batch, _, heads, channels = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    numbers = [TYPES.index(value.dtype), TYPES.index(locations.dtype), threads, most_blocks]
    numbers += [batch, heads, channels, queries, len(shapes), points, most_blocks // 2]
    numbers += itertools.chain(*shapes)
    numbers += [0] * (11 + 2 * 16 - len(numbers))
    case, result = folder / "case", folder / "result"
    case.write_bytes(struct.pack("=43i", *numbers) + b"".join(map(to_bytes, inputs)))
    done = run(program, case, result)
    assert done.returncode == 0, done.stderr[:4000]
    sums = torch.float64 if value.dtype == torch.float64 else torch.float32
    data = bytearray(result.read_bytes())
    outputs, offset = [], 0
    gradients = [torch.empty_like(value, dtype=sums), locations, weights]
    for like in [grad_output] * 3 + gradients * 2:
        got = torch.frombuffer(data, dtype=like.dtype, count=like.numel(), offset=offset)
        offset += like.numel() * like.element_size()
        outputs.append(got.view(like.shape))
    assert offset == len(data)
    return outputs[:3], outputs[3:6], outputs[6:]


def expected_outputs(shapes, inputs):
    value, locations, weights, grad_output, points, boxes = (tensor.double() for tensor in inputs)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    starts = list(itertools.accumulate((h * w for h, w in shapes[:-1]), initial=0))

    def operator(locations, weights):
        return ms_deform_attn_reference(leaves[0], shapes, starts, locations, weights)

    output = operator(*leaves[1:])
    gradients = torch.autograd.grad(output, leaves, grad_output)
    points, boxes = (tensor[:, :, None, :, None] for tensor in (points, boxes))
    pixel = 1 / torch.tensor(shapes, dtype=torch.float64).flip(1)[:, None]
    half = 0.5 * boxes[..., 2:] / locations.shape[4]
    softmax = weights.flatten(-2).softmax(-1).view(weights.shape)
    with torch.no_grad():
        outputs = [
            output,
            operator(points + locations * pixel, softmax),
            operator(boxes[..., :2] + locations * half, softmax),
        ]
    return outputs, gradients


def check(program, folder, dtypes, channels, levels_and_points, grid):
    levels, points = levels_and_points
    threads, blocks, queries, heads = grid
    shapes = LEVELS[:levels]
    inputs = make_inputs(*dtypes, 2, queries, heads, channels, shapes, points)
    outputs, *both_gradients = run_kernels(program, folder, threads, blocks, shapes, inputs)
    expected, expected_gradients = expected_outputs(shapes, inputs)
    names = ("output", "output of points", "output of boxes")
    pairs = list(zip(names, outputs, expected, strict=True))
    for order, gradients in zip(("", " in order"), both_gradients, strict=True):
        for name, got, wanted in zip(
            ("value", "locations", "weights"), gradients, expected_gradients, strict=True
        ):
            pairs.append((f"gradient of {name}{order}", got, wanted))
    for name, got, wanted in pairs:
        assert got.isfinite().all(), f"{name}: {got.isfinite().logical_not().sum()} not finite"
        error = ((got.double() - wanted).abs().max() / wanted.abs().max()).item()
        assert error < TOLERANCE[dtypes[0]], f"{name}: relative error {error:.1e}"


# Threads of a block, blocks at most, queries and heads: items that are no multiple of a block's,
# and fewer blocks than would do all items at once.
GRIDS = [(64, 100, 7, 3), (32, 2, 5, 2), (64, 1, 3, 3), (96, 100, 5, 2), (64, 2, 9, 2)]
LEVELS_AND_POINTS = [(1, 1), (5, 1), (3, 4), (4, 8), (2, 3), (1, 8), (5, 5), (4, 4)]
CHANNELS = [1, 5, 8, 20, 32, 40, 64, 160]
CASES = [
    (pair, channels, LEVELS_AND_POINTS[(i + j) % 8], GRIDS[(2 * i + j) % 5])
    for i, channels in enumerate(CHANNELS)
    for j, pair in enumerate(PAIRS)
]
FLOAT, MIXED = (torch.float32, torch.float32), (torch.float16, torch.float32)
# As many threads as on a GPU: with one channel, shared memory then has four samples of an item.
CASES += [(pair, 1, (1, 6), (256, 2, 50, 3)) for pair in (FLOAT, MIXED)]
RACE_CASES = [(FLOAT, 1, (4, 5), (64, 1, 30, 3)), (FLOAT, 32, (2, 4), (64, 2, 9, 2))]
RACE_CASES += [(FLOAT, 160, (1, 3), (64, 1, 9, 1)), (MIXED, 32, (3, 2), (64, 1, 7, 4))]


def name_of(case):
    (value, location), channels, (levels, points), (threads, blocks, queries, heads) = case
    types = "-".join(str(dtype).removeprefix("torch.") for dtype in (value, location))
    return f"{types}-D{channels}-L{levels}-K{points}-{threads}x{blocks}-Q{queries}-M{heads}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_kernels_agree_with_the_definition(memory_checked, tmp_path, case):
    check(memory_checked, tmp_path, *case)


@pytest.mark.parametrize("case", RACE_CASES, ids=name_of)
def test_threads_of_a_block_do_not_race(race_checked, tmp_path, case):
    check(race_checked, tmp_path, *case)


FAULTS = {  # number in cuda_on_cpu_faults.cpp: which sanitizer, and what it or the emulation says
    "missing barrier": (1, "races", "data race"),
    "sum without atomics": (8, "races", "data race"),
    "a thread skips a shuffle": (2, "memory", "some did not come to a barrier or shuffle"),
    "mask without one of the threads": (3, "memory", "not in"),
    "mask with a thread of the next group": (
        4,
        "memory",
        "some did not come to a barrier or shuffle",
    ),
    "shuffles at two places": (5, "memory", "others of the mask are at another call"),
    "return before a barrier": (6, "memory", "some did not come to a barrier or shuffle"),
    "write beyond the end": (7, "memory", "heap-buffer-overflow"),
    "misaligned vector": (9, "memory", "misaligned address"),
}


@pytest.fixture(scope="session")
def faulty(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    programs = {}
    for name, options in (("memory", MEMORY), ("races", RACES)):
        skip_without(folder, *options)
        programs[name] = compile_cuda(HERE / "cuda_on_cpu_faults.cpp", folder / name, *options)
    return programs


def test_right_kernels_pass(faulty):
    for program in faulty.values():
        done = run(program, 0)
        assert done.returncode == 0, done.stderr[:4000]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_noticed(faulty, fault):
    number, sanitizer, message = FAULTS[fault]
    done = run(faulty[sanitizer], number)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr[:4000]
