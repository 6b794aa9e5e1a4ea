"""Every launch of a kernel names all of its arguments."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cjepa_kernels

TRITON = Path(cjepa_kernels.__file__).parent / "triton"


def launches(source: str) -> Iterator[ast.Call]:
    """The calls ``run_kernel(some_kernel, programs, ...)`` in the text of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "run_kernel":
            yield node


@pytest.mark.parametrize(
    "module",
    [
        "pack",
        "tiles",
        "gradients",
        "hopper_gradients",
        "nt_xent",
        "cross_logsumexp",
        "self_logsumexp",
        "prediction_loss",
        "prepare",
    ],
)
def test_launches_name_every_argument(module: str) -> None:
    calls = list(launches((TRITON / f"{module}.py").read_text()))
    assert calls
    for launch in calls:
        assert len(launch.args) == 2, f"{module}.py:{launch.lineno} passes arguments by position"


def test_an_argument_by_position_is_found() -> None:
    (launch,) = launches("run_kernel(rows_kernel, 4, x, ROWS=32)\nother(rows_kernel, 4, x)")
    assert len(launch.args) == 3


def test_no_launch_passes_the_recorder_by() -> None:
    """A launch plan would miss a kernel that is launched in another way."""
    for path in TRITON.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = ast.unparse(node.func.value)
                assert not kernel.endswith("_kernel"), f"{path.name}:{node.lineno} {kernel}"
