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
@pytest.mark.parametrize("features", [64, 100, 128, 250, 256, 500, 512, 760, 768, 1024])
@pytest.mark.parametrize("dtype", gpu_hopper.DTYPES, ids=str)
def test_parity_of_the_backward_on_the_device(features: int, dtype: torch.dtype) -> None:
    record = gpu_hopper.check(features, dtype, gpu_hopper.BACKWARD)
    assert record["passed"], record


@on_hopper
@pytest.mark.parametrize("features", [128, 512])
def test_a_graph_replays_the_kernels_of_the_backward(features: int) -> None:
    x, y = gpu_hopper.views(16384, features, torch.bfloat16)
    expected = torch.cat(gpu_hopper.both(x, y, allowed=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = gpu_hopper.both(x, y, allowed=True)
    for grad in recorded:
        grad.zero_()
    graph.replay()
    assert torch.equal(torch.cat(recorded), expected)


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


def reference_gradients(x: Tensor, y: Tensor, *, allowed: bool) -> Tensor:
    """The reference in place of both kinds of kernels."""
    leaves = [view.float().requires_grad_() for view in (x, y)]
    out = nt_xent(*leaves, reduction="none", backend="reference")
    return torch.cat(torch.autograd.grad(out.loss, leaves, gpu_hopper.loss_weights(out.loss)))


def test_equal_gradients_pass() -> None:
    x, y = gpu_hopper.views(130, 64, torch.bfloat16, device="cpu")
    record = gpu_hopper.backward_parity(x, y, reference_gradients, sample=40)
    assert record["passed"]
    assert record["error"] < 1e-5
    assert record["same_bits"]


@pytest.mark.parametrize("fault", ["one_row", "nan", "all", "other_bits"])
def test_a_wrong_gradient_fails(fault: str) -> None:
    calls = []

    def broken(x: Tensor, y: Tensor, *, allowed: bool) -> Tensor:
        grads = reference_gradients(x, y, allowed=allowed)
        calls.append(allowed)
        if fault == "all":  # both kinds of kernels are wrong in the same way
            grads *= 1.1
        elif fault == "other_bits":
            grads[0, 0] += 1e-6 * len(calls)
        elif allowed:
            grads[17] = torch.nan if fault == "nan" else grads[17] * 1.003
        return grads

    x, y = gpu_hopper.views(130, 64, torch.bfloat16, device="cpu")
    assert not gpu_hopper.backward_parity(x, y, broken, sample=40)["passed"]


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


def test_alternatives_that_fail_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = []

    def check(features: int, *_: Any) -> dict[str, Any]:
        entries.append(gpu_hopper.configs.table()[0])
        return {"passed": features == 256}

    monkeypatch.setattr(gpu_hopper, "check", check)
    monkeypatch.setattr(gpu_hopper, "views", lambda *sizes: sizes[:2])
    monkeypatch.setattr(
        gpu_hopper, "interleaved_on_gpu", lambda builds, seconds: (dict.fromkeys(builds, 1.0), {})
    )
    for features, title in ((128, "64 columns"), (256, "squares")):
        record = gpu_hopper.check_alternative(features, title)
        assert entries[-1] == gpu_hopper.ALTERNATIVES[features][title][0]
        assert ("times of M = 65536" in record) == (features == 256)
        assert record["alternative"] == title


def test_what_fails_is_not_timed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[dict[str, Any]] = []
    candidates = (gpu_hopper.GLUON, gpu_hopper.TRITON, gpu_hopper.MM)
    monkeypatch.setattr("sys.argv", ["gpu_hopper.py"])
    monkeypatch.setattr(gpu_hopper, "why_not", lambda: None)
    monkeypatch.setattr(gpu_hopper, "FEATURES", (256, 512))
    monkeypatch.setattr(gpu_hopper, "BACKWARD_FEATURES", (256, 512))
    monkeypatch.setattr(gpu_hopper, "views", lambda *sizes: sizes)
    monkeypatch.setattr(
        gpu_hopper,
        "check",
        lambda features, dtype, direction: {
            "D": features,
            "dtype": str(dtype)[6:],
            "direction": direction,
            "passed": features == 256 or (features == 512 and direction == gpu_hopper.BACKWARD),
        },
    )
    monkeypatch.setattr(
        gpu_hopper,
        "times",
        lambda rows, features, dtype, direction: {name: {"median": 2.0} for name in candidates},
    )
    monkeypatch.setattr(
        gpu_hopper,
        "save",
        lambda options, name, rows, **more: saved.append({"rows": [*rows], **more}),
    )
    assert gpu_hopper.main() == 1
    assert len(saved[0]["parity"]) == 8
    timed = [(256, gpu_hopper.FORWARD), (256, gpu_hopper.BOTH), (512, gpu_hopper.BOTH)]
    assert {(r["M"], r["D"], r["pass"], r["name"]) for r in saved[-1]["rows"]} == {
        (rows, *one, name) for rows in gpu_hopper.ROWS for one in timed for name in candidates
    }
    assert "2000.000" in capsys.readouterr().out
