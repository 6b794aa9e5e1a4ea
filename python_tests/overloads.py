"""The operators' overloads that run on this machine."""

from __future__ import annotations

import pytest

from cjepa_kernels import backends, ops

RUNNABLE = [o for o in ops.OVERLOADS if o != ".triton" or backends()["triton"].available]
OVERLOADS = pytest.mark.parametrize(
    "overload", RUNNABLE, ids=[overload.lstrip(".") or "dispatched" for overload in RUNNABLE]
)
