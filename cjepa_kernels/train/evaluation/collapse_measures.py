"""Measures of collapse, in which the features of different images become equal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def standard_deviation(features: npt.ArrayLike) -> float:
    """Spread of the directions of the features: 1 for an isotropic cloud, 0 for collapse.

    Args:
        features: (N, D), any real dtype.

    Returns:
        The mean over dimensions of the standard deviation of the L2-normalised features, times
        the square root of D.

    Source:
        Chen & He, "Exploring Simple Siamese Representation Learning", arXiv 2011.10566, section 4.
    """
    x = np.asarray(features, dtype=np.float64)
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return float(unit.std(axis=0).mean() * np.sqrt(x.shape[1]))


def effective_rank(features: npt.ArrayLike) -> float:
    """Number of directions that the centred features effectively use, between 0 and min(N, D).

    Args:
        features: (N, D), any real dtype.

    Returns:
        exp of the entropy of the singular values, normalised to sum 1; 0 if all features are equal.

    Source:
        Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.
    """
    x = np.asarray(features, dtype=np.float64)
    singular_values = np.linalg.svd(x - x.mean(axis=0), compute_uv=False)
    total = singular_values.sum()
    if total <= 1e-9 * max(1.0, float(np.abs(x).max(initial=0.0))) * np.sqrt(x.size):
        return 0.0
    p = singular_values[singular_values > 0] / total
    return float(np.exp(-(p * np.log(p)).sum()))
