"""One comparison: ratios, what is left out, memory."""

import math
import sys
from functools import partial

from ddetr_d2.errors import UserError

import pytest
import torch
from tqdm import tqdm

from benchmarks.cases import Case, Prepared, relative_difference

# Megabytes that a call holds at once, and bytes that it leaves behind.
BLOCK, KEPT = 60, []


def prepare_block() -> Prepared:
    """What is measured in a process of its own, which imports it from here."""
    torch.ones(2 * BLOCK * 250_000)  # freed before the call

    def run():
        torch.ones(BLOCK * 250_000)
        KEPT.append(torch.ones(5_000_000))

    return Prepared(run)


def measure(case: Case, turns: int = 1, memory: bool = False) -> dict[str, dict]:
    """Records by implementation."""
    with tqdm(disable=True) as progress:
        records = case.measure(turns, memory, "cpu", progress)
    assert all(x["case"] == case.name for x in records)
    return {x["implementation"]: x for x in records}


def returning(*values: float, **options) -> partial:
    """Prepares what computes these numbers."""
    run = partial(list, [torch.tensor(values)])
    return partial(Prepared, run, run, **options)


def test_ratios():
    """Of medians, with the range of those within a round."""
    durations = iter([8.0, 4.0, 1.0, 9.0, 3.0, 2.0, 7.0, 2.0, 1.0])
    make = {
        name: partial(Prepared, lambda: None) for name in ("other", "ddetr_d2", "ddetr_d2, half")
    }
    found = measure(Case("three", make, timer=lambda _: next(durations)), turns=3)
    assert found["other"]["ms"] == [8000, 7000, 9000]
    assert found["other"]["seconds"] == [8, 9, 7]
    assert found["other"]["times_first"] is None
    assert found["ddetr_d2"]["times_first"] == pytest.approx([8 / 3, 2, 3.5])
    assert found["ddetr_d2"]["times_ours"] is None
    assert found["ddetr_d2, half"]["times_first"] == pytest.approx([8, 4.5, 8])
    assert found["ddetr_d2, half"]["times_ours"] == pytest.approx([3, 1.5, 4])


def test_what_is_absent_or_wrong_is_left_out(capsys):
    def absent():
        raise ImportError(name="fast_detr")

    def unknown():
        raise UserError("there is no such model.")

    make = {
        "absent": absent,
        "unknown": unknown,
        "right": returning(3.0, 4.0),
        "rounded": returning(3.0, 4.05, tolerance=0.02),
        "wrong": returning(3.0, 4.5, tolerance=0.02),
        "not a number": returning(3.0, math.nan, tolerance=0.02),
    }
    found = measure(Case("sums", make))
    assert list(found) == ["right", "rounded"]
    assert found["rounded"]["difference"] == pytest.approx(0.01, rel=1e-3)
    said = capsys.readouterr().err
    assert "sums: absent is left out, pip install fast_detr brings it." in said
    assert "sums: unknown is left out: there is no such model." in said
    assert "sums: wrong is left out: its results are wrong, by a relative difference of 0.1" in said
    assert "sums: not a number is left out" in said


def test_own_wrong_results_are_an_error():
    expected = partial(list, [torch.tensor([3.0, 4.0])])
    case = Case("sums", {"ddetr_d2": returning(3.0, 4.5, tolerance=0.02)}, expected=expected)
    with pytest.raises(RuntimeError, match="ddetr_d2 is no use, its results are wrong"):
        measure(case)


def test_the_largest_difference_counts():
    found = relative_difference(
        [torch.tensor([1.0, 1.0]), torch.tensor([2.2])],
        [torch.tensor([1.0, 1.0]), torch.tensor([2.0])],
    )
    assert found == pytest.approx(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of the memory")
def test_memory_of_two_calls():
    found = measure(Case("block", {"a": prepare_block}, memory=True), memory=True)["a"]
    # The second call's block beside what the first one has left behind, 20 MB.
    assert found["growth_mb"] == pytest.approx(BLOCK + 20, abs=15)
    assert found["growth_share"] == 1
    assert found["peak_mb"] > found["growth_mb"] + 50


def test_share_of_the_limit():
    prepared = Prepared(lambda: None, limit=lambda: 0.5)
    found = measure(Case("limited", {"a": lambda: prepared}, timer=lambda _: 2.0))["a"]
    assert found["limit_share"] == 0.25


def test_profile():
    x = torch.ones(400, 400)
    prepared = Prepared(lambda: torch.mm(x, x), limit="profile")
    found = measure(Case("product", {"a": lambda: prepared}))["a"]
    assert found["operators"][0]["operator"] == "aten::mm"
    assert 0.5 < found["limit_share"] <= 1
    prepared = Prepared(lambda: x.exp(), limit="profile")
    assert measure(Case("exponential", {"a": lambda: prepared}))["a"]["limit_share"] == 0
