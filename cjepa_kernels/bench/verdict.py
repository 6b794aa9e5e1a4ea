"""The ratio of two candidates' interleaved times, its interval, and a verdict.

A round times every candidate once, so a round i gives a ratio r_i = t_i / s_i of the other's time
t_i and our time s_i in which the machine's speed at that moment cancels. Spells of load last
longer than a round, so the rounds are not independent draws. They are cut into at most BLOCKS
consecutive blocks, and a block counts once, by the median of its ratios. A block's median lies
above the true median with probability 1/2, whatever the distribution of the times is. The interval
from the k-th lowest to the k-th highest of n block medians therefore misses it with probability
2 P(Binomial(n, 1/2) < k). k is the largest for which that is at most 1 - CONFIDENCE: the sign
test's interval. Fewer than MIN_ROUNDS rounds have no such k and give no verdict.

A process has one memory layout, which alone changes times by a percent or two, so a ratio within
MARGIN of 1 is not called a difference.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

from cjepa_kernels.bench.timing import Clock, Run, Times, add_rounds

CONFIDENCE = 0.99
BLOCKS = 16
MIN_ROUNDS = 8  # 2 / 2**8 is below 1 - CONFIDENCE, and 2 / 2**7 is not.
MARGIN = 1.02

Verdict = Literal["faster", "slower", "equal", "unclear"]


class Ratio(NamedTuple):
    """The other's time divided by ours.

    Attributes:
        value: Median over the blocks of rounds.
        low: Lower end of the interval; None with fewer than MIN_ROUNDS rounds.
        high: Its upper end.
        rounds: Rounds in which both were timed.
    """

    value: float
    low: float | None
    high: float | None
    rounds: int

    def verdict(self) -> Verdict:
        """Whether we are faster or slower, equal within MARGIN, or whether that is unclear."""
        if self.low is None or self.high is None:
            return "unclear"
        if self.low > MARGIN:
            return "faster"
        if self.high < 1 / MARGIN:
            return "slower"
        return "equal" if self.low >= 1 / MARGIN and self.high <= MARGIN else "unclear"

    def inverse(self) -> Ratio:
        """Our time divided by the other's."""
        low, high = (None if end is None else 1 / end for end in (self.high, self.low))
        return Ratio(1 / self.value, low, high, self.rounds)

    def record(self) -> dict[str, Any]:
        """The ratio as a results file holds it."""
        return self._asdict()


def ratio_of(ours: Sequence[float], other: Sequence[float]) -> Ratio:
    """The ratio of two candidates' times and its interval.

    Args:
        ours: Our seconds in each round, at least one.
        other: The other's, in the same rounds; the later rounds of one may lack the other.
    """
    ratios = [theirs / mine for mine, theirs in zip(ours, other, strict=False)]
    blocks = min(len(ratios), BLOCKS)
    bounds = [len(ratios) * i // blocks for i in range(blocks + 1)]
    medians = [statistics.median(ratios[bounds[i] : bounds[i + 1]]) for i in range(blocks)]
    return ratio_of_blocks(medians, rounds=len(ratios))


def ratio_of_blocks(medians: Sequence[float], *, rounds: int) -> Ratio:
    """The ratio and its interval from the median ratio of each block.

    Args:
        medians: Of blocks that are independent draws, at least one.
        rounds: In all blocks together.
    """
    ordered = sorted(medians)
    value, k = statistics.median(ordered), _order(len(ordered))
    if k == 0:
        return Ratio(value, None, None, rounds)
    return Ratio(value, ordered[k - 1], ordered[-k], rounds)


def _order(blocks: int) -> int:
    """k: the k-th block median from each side is an end of the interval; 0 if there is none."""
    k, missed = 0, 0.0
    while (missed := missed + 2 * math.comb(blocks, k) / 2**blocks) <= 1 - CONFIDENCE:
        k += 1
    return k


def settle(
    calls: dict[str, Run],
    times: Times,
    *,
    ours: str,
    others: Sequence[str],
    seconds: float,
    clock: Clock,
    now: Callable[[], float] = time.perf_counter,
) -> list[str]:
    """Time candidates further, with ours beside them, until every verdict is clear.

    The number of rounds doubles from one look at the verdicts to the next, so that there are few
    looks at which chance could make one clear.

    Args:
        calls: Calls by name, which have run before.
        times: Seconds of the rounds so far; further ones are appended.
        ours: Name of what the others are compared with.
        others: Names of the calls that need a verdict.
        seconds: Longest time. A round that has begun is finished.
        clock: Seconds of a call.
        now: Seconds since some moment.

    Returns:
        The names whose verdicts are still unclear.
    """
    deadline = now() + seconds
    aim = max(MIN_ROUNDS, len(times[ours]))
    while True:
        unclear = [n for n in others if ratio_of(times[ours], times[n]).verdict() == "unclear"]
        if not unclear or now() >= deadline:
            return unclear
        if len(times[ours]) >= aim:
            aim = 2 * len(times[ours])
        running = {name: calls[name] for name in (ours, *unclear)}
        while len(times[ours]) < aim and now() < deadline:
            add_rounds(running, times, clock=clock)
