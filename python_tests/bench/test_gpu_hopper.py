"""The check of the Gluon kernels: on a Hopper GPU their parity, elsewhere the check itself."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_scripts import load
from torch import Tensor

from cjepa_kernels import nt_xent

gpu_hopper = load("gpu_hopper")
on_hopper = pytest.mark.skipif(gpu_hopper.why_not() is not None, reason=str(gpu_hopper.why_not()))


@on_hopper
@pytest.mark.parametrize("features", [64, 100, 128, 250, 256, 384, 512, 600, 640, 768])
@pytest.mark.parametrize("dtype", gpu_hopper.DTYPES, ids=str)
def test_parity_on_the_device(features: int, dtype: torch.dtype) -> None:
    record = gpu_hopper.check(features, dtype)
    assert record["passed"], record


@on_hopper
@pytest.mark.parametrize("features", [128, 512])
def test_a_graph_replays_the_kernels(features: int) -> None:
    x, y = gpu_hopper.views(16384, features, torch.bfloat16)
    expected = gpu_hopper.forward(x, y, allowed=True).loss.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = gpu_hopper.forward(x, y, allowed=True)
    recorded.loss.zero_()
    graph.replay()
    assert torch.equal(recorded.loss, expected)


def reference_forward(x: Tensor, y: Tensor, *, allowed: bool) -> Any:
    """The reference in place of both kinds of kernels."""
    out = nt_xent(x.float(), y.float(), reduction="none", backend="reference")
    return SimpleNamespace(loss=out.loss, accuracy=out.accuracy)


def test_equal_losses_pass() -> None:
    x, y = gpu_hopper.views(130, 64, torch.bfloat16, device="cpu")
    record = gpu_hopper.parity(x, y, reference_forward, sample=40)
    assert record["passed"]
    assert record["error"] < 1e-5
    assert record["same_bits"]


@pytest.mark.parametrize("fault", ["one_anchor", "nan", "all", "other_bits", "accuracy"])
def test_a_wrong_result_fails(fault: str) -> None:
    calls = []

    def broken(x: Tensor, y: Tensor, *, allowed: bool) -> Any:
        out = reference_forward(x, y, allowed=allowed)
        calls.append(allowed)
        if fault == "all":  # both kinds of kernels are wrong in the same way
            out.loss *= 1.1
        elif fault == "other_bits":
            out.loss[0] += 1e-6 * len(calls)
        elif allowed and fault == "accuracy":
            out.accuracy -= 0.5
        elif allowed:
            out.loss[17] = torch.nan if fault == "nan" else out.loss[17] * 1.001
        return out

    x, y = gpu_hopper.views(130, 64, torch.bfloat16, device="cpu")
    assert not gpu_hopper.parity(x, y, broken, sample=40)["passed"]


@pytest.mark.parametrize("before", [None, "0"])
def test_the_variable_is_restored(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv("CJEPA_GLUON", raising=False)
    else:
        monkeypatch.setenv("CJEPA_GLUON", before)
    with gpu_hopper.gluon(allowed=True):
        assert os.environ["CJEPA_GLUON"] == "1"
    assert os.environ.get("CJEPA_GLUON") == before


def test_another_device_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_hopper.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_hopper.main() == 0
    assert capsys.readouterr().out == "Nothing was measured: there is no CUDA device.\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert gpu_hopper.why_not() == "the kernels need compute capability 9.0, this GPU has 8.0"


def test_what_fails_is_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[dict[str, Any]] = []
    candidates = (gpu_hopper.GLUON, gpu_hopper.TRITON, gpu_hopper.MM)
    monkeypatch.setattr("sys.argv", ["gpu_hopper.py"])
    monkeypatch.setattr(gpu_hopper, "why_not", lambda: None)
    monkeypatch.setattr(gpu_hopper, "FEATURES", (256, 512))
    monkeypatch.setattr(gpu_hopper, "views", lambda *sizes: sizes)
    monkeypatch.setattr(
        gpu_hopper,
        "check",
        lambda features, dtype: {"D": features, "dtype": str(dtype)[6:], "passed": features == 256},
    )
    monkeypatch.setattr(
        gpu_hopper,
        "times",
        lambda rows, features, dtype: {name: {"median": 2.0} for name in candidates},
    )
    monkeypatch.setattr(
        gpu_hopper,
        "save",
        lambda options, name, rows, **more: saved.append({"rows": [*rows], **more}),
    )
    assert gpu_hopper.main() == 1
    assert len(saved[0]["parity"]) == 4
    assert {(r["M"], r["D"], r["name"]) for r in saved[-1]["rows"]} == {
        (rows, 256, name) for rows in gpu_hopper.ROWS for name in candidates
    }
    assert "2000.000" in capsys.readouterr().out
