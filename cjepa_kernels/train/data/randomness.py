"""Counter-based random numbers: a pure function of (seed, stream, epoch, sample, position).

The numbers of a generator depend on how many were drawn before, so they change with the
composition of a batch, with the number of devices and when a run is resumed. These numbers do not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_MANTISSA = 24


def stream_key(seed: int, *counters: int) -> int:
    """Mix a seed and any counters into one 64-bit key.

    Args:
        seed: The experiment's seed.
        counters: Numbers that tell streams apart, such as a purpose, an epoch and a view.

    Returns:
        An integer in [0, 2^64).

    Source:
        The finaliser of SplitMix64: Steele, Lea & Flood, "Fast splittable pseudorandom number
        generators", OOPSLA 2014.
    """
    key = _mix_int(seed & _WORD)
    for counter in counters:
        key = _mix_int((key + (counter + 1) * _GOLDEN) & _WORD)
    return key


def uniform(key: int, samples: Tensor, count: int) -> Tensor:
    """Draw uniform numbers for each sample.

    Args:
        key: From :func:`stream_key`.
        samples: (n,) int64, indices of the samples in the whole training set.
        count: Numbers per sample.

    Returns:
        (n, count) fp32 in [0, 1), on the device of ``samples``; a row depends on its own sample
        index alone.
    """
    # The upper 24 bits are mixed best, and they fill the mantissa of fp32 exactly.
    bits = _shift_right(_hash(key, samples, count), 64 - _MANTISSA)
    return bits.to(torch.float32) * (1.0 / (1 << _MANTISSA))


def normal(key: int, samples: Tensor, count: int) -> Tensor:
    """Draw standard normal numbers for each sample, by Box-Muller.

    Args:
        key: From :func:`stream_key`.
        samples: (n,) int64, indices of the samples in the whole training set.
        count: Numbers per sample.

    Returns:
        (n, count) fp32, on the device of ``samples``.
    """
    half = (count + 1) // 2
    pairs = uniform(key, samples, 2 * half)
    radius = (-2.0 * torch.log1p(-pairs[:, :half])).sqrt()
    angle = (2.0 * math.pi) * pairs[:, half:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def permutation(key: int, count: int) -> Tensor:
    """Draw a permutation.

    Args:
        key: From :func:`stream_key`.
        count: Number of elements.

    Returns:
        (count,) int64 on the CPU.
    """
    # Two of the 64-bit hashes are equal with a probability below count^2 / 2^64, and even then a
    # stable sort gives the same permutation everywhere.
    return _hash(key, torch.zeros(1, dtype=torch.int64), count)[0].argsort(stable=True)


def _hash(key: int, samples: Tensor, count: int) -> Tensor:
    state = _mix(samples * _signed(_GOLDEN) + _signed(key))
    positions = torch.arange(1, count + 1, device=samples.device) * _signed(_GOLDEN)
    return _mix(state[:, None] + positions)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, _SHIFTS[0])) * _signed(_MULTIPLIERS[0])
    x = (x ^ _shift_right(x, _SHIFTS[1])) * _signed(_MULTIPLIERS[1])
    return x ^ _shift_right(x, _SHIFTS[2])


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # PyTorch shifts int64 arithmetically, so the mask removes the copies of the sign bit.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> _SHIFTS[0])) * _MULTIPLIERS[0]) & _WORD
    x = ((x ^ (x >> _SHIFTS[1])) * _MULTIPLIERS[1]) & _WORD
    return x ^ (x >> _SHIFTS[2])


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
