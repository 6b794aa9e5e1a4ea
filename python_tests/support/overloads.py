"""The back ends and the operators' overloads that run on this machine."""

from __future__ import annotations

import os

import pytest

from cjepa_kernels import backends, ops

# Tests that run in Triton's interpreter are slow.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
RUNNABLE = [o for o in ops.overloads() if o != ".triton" or backends()["triton"].available]
OVERLOADS = pytest.mark.parametrize(
    "overload", RUNNABLE, ids=[overload.lstrip(".") or "dispatched" for overload in RUNNABLE]
)
# bench/gpu_check_steps.py sets "cuda", and the suite's tensors are then made on the GPU.
DEVICE = os.environ.get("CJEPA_TEST_DEVICE", "cpu")
BACKENDS = [
    name
    for name, status in backends().items()
    if status.available and not {DEVICE, "any"}.isdisjoint(status.devices)
]
