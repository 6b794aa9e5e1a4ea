"""Verdicts of ``cjepa bench`` on synthetic times that are quiet, noisy, drifting or few."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from documents import DOCS

from cjepa_kernels.bench.comparison import Settings
from cjepa_kernels.bench.timing import Run, Times, add_rounds, timed_rounds
from cjepa_kernels.bench.verdict import (
    BLOCKS,
    CONFIDENCE,
    MARGIN,
    MIN_ROUNDS,
    Ratio,
    ratio_of,
    settle,
)


class FakeMachine:
    """Calls whose times are prescribed, and a clock that advances by these times."""

    def __init__(self, seconds: dict[str, Callable[[int], float]]) -> None:
        self.calls: dict[str, Run] = {name: lambda name=name: name for name in seconds}
        self.seconds = seconds
        self.time = 0.0
        self.order: list[str] = []

    def clock(self, run: Run) -> float:
        name = str(run())
        seconds = self.seconds[name](self.order.count(name))
        self.order.append(name)
        self.time += seconds
        return seconds

    def now(self) -> float:
        return self.time

    def rounds(self, seconds: float, least: int = 3) -> Times:
        return timed_rounds(
            self.calls, seconds=seconds, least=least, clock=self.clock, warm=True, now=self.now
        )

    def settle(self, times: Times, seconds: float) -> list[str]:
        others = [name for name in self.calls if name != "ours"]
        return settle(
            self.calls,
            times,
            ours="ours",
            others=others,
            seconds=seconds,
            clock=self.clock,
            now=self.now,
        )


def noisy(mean: float, *, seed: int, sigma: float = 0.5) -> Callable[[int], float]:
    draw = random.Random(seed)
    return lambda _: mean * math.exp(draw.gauss(0.0, sigma))


def verdict(ours: list[float], other: list[float]) -> str:
    return ratio_of(ours, other).verdict()


def test_the_interval_is_that_of_the_sign_test() -> None:
    """With 16 blocks the interval goes from the third smallest ratio to the third largest.

    The true ratio lies outside with probability 2 (1 + 16 + 120) / 2^16.
    """
    ratios = [1.0 + i / 10 for i in range(16)]
    shuffled = random.Random(0).sample(ratios, 16)
    assert ratio_of([1.0] * 16, shuffled) == Ratio(
        pytest.approx(1.75), pytest.approx(1.2), pytest.approx(2.3), 16
    )
    missed = 2 * (1 + 16 + math.comb(16, 2)) / 2**16
    assert missed <= 1 - CONFIDENCE < missed + 2 * math.comb(16, 3) / 2**16
    eight = ratio_of([1.0] * 8, ratios[:8])
    assert (eight.low, eight.high) == (1.0, 1.7)
    assert 2 / 2**MIN_ROUNDS <= 1 - CONFIDENCE < 2 / 2 ** (MIN_ROUNDS - 1)


def test_quiet_times_are_decided_by_the_fewest_rounds() -> None:
    ours, other = [1.0, 1.01] * 4, [5.6, 5.5] * 4
    assert verdict(ours, other) == "faster"
    assert verdict(other, ours) == "slower"
    assert verdict(ours, [1.01, 1.0] * 4) == "equal"


def test_three_calls_prove_nothing_however_far_apart_they_are() -> None:
    ratio = ratio_of([1.0, 1.0, 1.0], [0.13, 0.14, 0.12])
    assert ratio.verdict() == "unclear"
    assert (ratio.low, ratio.high, ratio.rounds) == (None, None, 3)
    assert ratio.value == pytest.approx(0.13)
    assert verdict([1.0] * (MIN_ROUNDS - 1), [9.0] * (MIN_ROUNDS - 1)) == "unclear"
    assert verdict([1.0] * MIN_ROUNDS, [9.0] * MIN_ROUNDS) == "faster"


def test_noise_that_hides_the_difference_is_unclear() -> None:
    draw = random.Random(3)
    ours = [math.exp(draw.gauss(0, 1.0)) for _ in range(24)]
    other = [0.9 * math.exp(draw.gauss(0, 1.0)) for _ in range(24)]
    ratio = ratio_of(ours, other)
    assert ratio.verdict() == "unclear"
    assert ratio.low is not None
    assert ratio.high is not None
    assert ratio.low < 1 < ratio.high


def test_a_drift_of_the_machine_cancels_in_the_ratios() -> None:
    """The machine becomes six times as slow, which hides a difference of 20 % in the medians."""
    speed = [1 + 5 * i / 31 for i in range(32)]
    ratio = ratio_of(speed, [1.2 * s for s in speed])
    assert ratio.verdict() == "faster"
    assert ratio.low == ratio.high == pytest.approx(1.2)


def test_a_ratio_that_drifts_across_one_is_unclear() -> None:
    other = [0.5 + i / 100 for i in range(100)]
    assert verdict([1.0] * 100, other) == "unclear"


def test_a_spell_of_load_counts_as_what_it_hits_not_as_many_rounds() -> None:
    """One spell of load slows half of 400 rounds. Whole blocks differ, so the interval is wide."""
    other = [1.5] * 190 + [0.2] * 210
    assert verdict([1.0] * 400, other) == "unclear"
    assert verdict([1.0] * 400, [1.5] * 400) == "faster"


def test_outliers_do_not_decide() -> None:
    ours, other = [1.0] * 64, [1.3] * 64
    for i in range(0, 64, 9):
        other[i] = 0.01  # Eight calls seem a hundred times as fast.
    for i in range(5, 64, 9):
        ours[i] = 50.0
    ratio = ratio_of(ours, other)
    assert ratio.verdict() == "faster"
    assert ratio.value == pytest.approx(1.3)


def test_a_difference_within_the_margin_is_none() -> None:
    assert verdict([1.0] * 20, [1.015] * 20) == "equal"
    assert verdict([1.0] * 20, [MARGIN + 1e-3] * 20) == "faster"
    assert verdict([1.0] * 20, [1.0, 1.05] * 10) == "unclear"


def test_chance_alone_hardly_ever_makes_a_verdict() -> None:
    """The candidates are equal, and ``settle`` adds rounds while the noise leaves them unclear."""
    wrong, rounds = 0, 0
    for seed in range(150):
        machine = FakeMachine({"ours": noisy(1, seed=seed), "other": noisy(1, seed=-1 - seed)})
        times = machine.rounds(seconds=10)
        machine.settle(times, seconds=150)
        rounds += len(times["ours"])
        wrong += verdict(times["ours"], times["other"]) in ("faster", "slower")
    assert rounds > 150 * 4 * MIN_ROUNDS
    assert wrong <= 6  # 150 tries with four looks each, and 1 % error per look.


def test_a_real_difference_is_found_by_more_rounds() -> None:
    decided = 0
    for seed in range(20):
        machine = FakeMachine(
            {"ours": noisy(1, seed=seed, sigma=0.3), "other": noisy(1.5, seed=-1 - seed, sigma=0.3)}
        )
        times = machine.rounds(seconds=5)
        decided += not machine.settle(times, seconds=500)
    assert decided == 20


def test_clear_candidates_are_not_timed_further() -> None:
    machine = FakeMachine(
        {"ours": lambda _: 1.0, "clear": lambda _: 3.0, "unclear": noisy(1, seed=0)}
    )
    times = machine.rounds(seconds=45)
    before = {name: len(values) for name, values in times.items()}
    assert before["ours"] == before["clear"] >= MIN_ROUNDS
    start = machine.time
    assert machine.settle(times, seconds=60) == ["unclear"]
    assert len(times["clear"]) == before["clear"]
    assert len(times["unclear"]) == len(times["ours"]) > before["ours"]
    assert 60 <= machine.time - start < 60 + 10  # A round that has begun is finished.
    assert verdict(times["ours"], times["clear"]) == "faster"


def test_few_rounds_of_slow_calls_become_enough() -> None:
    machine = FakeMachine({"ours": lambda _: 0.4, "other": lambda _: 2.4})
    times = machine.rounds(seconds=1)
    assert len(times["ours"]) == 3
    assert machine.settle(times, seconds=90) == []
    assert len(times["ours"]) == MIN_ROUNDS
    assert verdict(times["ours"], times["other"]) == "faster"


def test_without_more_time_it_stays_unclear() -> None:
    machine = FakeMachine({"ours": lambda _: 0.4, "other": lambda _: 2.4})
    times = machine.rounds(seconds=1)
    assert machine.settle(times, seconds=0) == ["other"]
    assert len(times["ours"]) == 3


def test_the_order_of_a_round_is_reversed_in_the_next() -> None:
    machine = FakeMachine(dict.fromkeys("abc", lambda _: 1.0))
    times: Times = {name: [] for name in "abc"}
    for _ in range(3):
        add_rounds(machine.calls, times, clock=machine.clock)
    assert "".join(machine.order) == "abccbaabc"
    assert [len(values) for values in times.values()] == [3, 3, 3]


def test_blocks_take_in_every_round() -> None:
    """Every round counts, even if their number is no multiple of the number of blocks."""
    for count in range(1, 3 * BLOCKS):
        ratio = ratio_of([1.0] * count, [2.0] * count)
        assert (ratio.value, ratio.rounds) == (2.0, count)


def test_the_rules_are_those_of_the_page() -> None:
    page = " ".join((DOCS / "benchmarks.md").read_text(encoding="utf-8").split())
    for rule in (
        f"Its {CONFIDENCE:.0%} interval is that of the sign test".replace("%", " %"),
        f"cut into at most {BLOCKS} blocks",
        f"Fewer than {MIN_ROUNDS} rounds",
        f"*as fast* if it lies within {100 * (MARGIN - 1):.0f} %",
        f"for up to {Settings().patience:.0f} times `--seconds`",
    ):
        assert rule in page
