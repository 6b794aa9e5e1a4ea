"""How uncertain an accuracy is: by the seeds of the training and by the images of the test set."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.special import stdtrit

CONFIDENCE = 0.95
_Z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


def wilson(percent: float, images: int) -> tuple[float, float]:
    """The interval of an accuracy by the number of test images alone.

    Args:
        percent: The accuracy, 0 to 100.
        images: Number of test images, at least 1.

    Returns:
        Lower and upper end in per cent.

    Source:
        Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    p, z2 = percent / 100, _Z**2
    centre = (p + z2 / (2 * images)) / (1 + z2 / images)
    half = _Z * math.sqrt(p * (1 - p) / images + z2 / (4 * images**2)) / (1 + z2 / images)
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def difference_margin(first: Sequence[float], second: Sequence[float], images: int) -> float:
    """Half the width of the interval of mean(first) - mean(second).

    The seeds count by the paired t interval. The test images count as if each mean had been
    measured on images of its own (Agresti-Caffo): all seeds share the test set, so seeds that
    agree say nothing about other images. Which images are wrong is not kept, so what two encoders
    have in common on the same images is not taken out, and the margin errs on the safe side.

    Args:
        first: Accuracies in per cent, one per seed.
        second: The same of the other arm, in the same order of seeds.
        images: Number of test images.

    Returns:
        Points; infinite for a single seed, whose deviation is unknown.

    Source:
        Agresti & Caffo, "Simple and effective confidence intervals for proportions and differences
        of proportions", The American Statistician 2000.
    """
    seeds = len(first)
    if seeds < 2:
        return math.inf
    differences = [a - b for a, b in zip(first, second, strict=True)]
    t = float(stdtrit(seeds - 1, (1 + CONFIDENCE) / 2))
    of_seeds = t * statistics.stdev(differences) / math.sqrt(seeds)
    variance = 0.0
    for values in (first, second):
        p = (statistics.fmean(values) / 100 * images + 1) / (images + 2)
        variance += p * (1 - p) / (images + 2)
    return math.hypot(of_seeds, 100 * _Z * math.sqrt(variance))
