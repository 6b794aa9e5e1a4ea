"""Numbers that Python and the compiled module both hold are the same."""

from __future__ import annotations

import pytest

from cjepa_kernels import backends, definitions
from cjepa_kernels.backends import compiled_module
from cjepa_kernels.environment import DEFAULT_MEBIBYTES

pytestmark = pytest.mark.skipif(
    not backends()["native"].available, reason="cjepa_kernels._C was not built: no compiler here"
)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("small_block", definitions.SMALL_BLOCK),
        ("large_block", definitions.LARGE_BLOCK),
        ("large_block_rows", definitions.LARGE_BLOCK_ROWS),
        ("default_mebibytes", DEFAULT_MEBIBYTES),
    ],
    ids=["small_block", "large_block", "large_block_rows", "default_mebibytes"],
)
def test_the_module_holds_the_same_number(name: str, number: float) -> None:
    module = compiled_module()
    assert module is not None
    assert module.constants()[name] == number
