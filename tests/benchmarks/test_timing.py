"""The timer: order, number and length of turns."""

import time

from benchmarks import timing


def test_turns_alternate():
    calls, turns = [], []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    durations = iter(range(1, 7))

    def timer(function):
        function()
        return next(durations)

    times = timing.in_turns(functions, 3, timer, lambda: turns.append(len(calls)))
    assert calls == ["a", "b"] * 3
    assert times == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert turns == [1, 2, 3, 4, 5, 6]


def test_a_turn_of_a_short_function_is_the_median_of_many_calls(monkeypatch):
    monkeypatch.setattr(timing, "TURN_SECONDS", 0.5)
    durations = iter([0.1, 0.1, 0.3, 9.0, 0.2, 0.0])  # the first one tells how many
    times = timing.in_turns({"a": lambda: None}, 1, lambda _: next(durations), short=True)
    assert times == {"a": [0.2]}


def test_long_cases_end_after_two_turns(monkeypatch):
    monkeypatch.setattr(timing, "CASE_SECONDS", 0.0)
    assert len(timing.in_turns({"a": lambda: None}, 9)["a"]) == 2
    assert len(timing.in_turns({"a": lambda: None}, 1)["a"]) == 1


def test_seconds_of_a_call():
    for timer in (timing.wall_seconds, timing.kernel_seconds):
        assert 0.05 <= timer(lambda: time.sleep(0.05)) < 5
