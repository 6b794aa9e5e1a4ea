"""Every launch of a kernel names all of its arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cjepa_kernels

TRITON = Path(cjepa_kernels.__file__).parent / "triton"


def launches(source: str) -> Iterator[ast.Call]:
    """The calls ``some_kernel[grid](...)`` in the text of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            kernel = node.func.value
            name = kernel.attr if isinstance(kernel, ast.Attribute) else getattr(kernel, "id", "")
            if name.endswith("_kernel"):
                yield node


@pytest.mark.parametrize(
    "module", ["pack", "tiles", "gradients", "nt_xent", "cross_logsumexp", "prediction_loss"]
)
def test_launches_name_every_argument(module: str) -> None:
    calls = list(launches((TRITON / f"{module}.py").read_text()))
    assert calls
    for launch in calls:
        assert not launch.args, f"{module}.py:{launch.lineno} passes arguments by position"


def test_an_argument_by_position_is_found() -> None:
    (launch,) = launches("reduction.rows_kernel[(4,)](x, ROWS=32)\nother[(4,)](x)")
    assert len(launch.args) == 1
