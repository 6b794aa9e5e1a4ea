"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from typing import Any

# NumPy, PyTorch and the compiled module read these variables when they are loaded. Processes that
# tests start inherit them. With more threads, OpenBLAS would keep every core busy during each
# product of Triton's interpreter.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CJEPA_POISON_MEMORY": "1"}

import pytest
import torch
from overloads import BACKENDS, DEVICE
from ranks import Ranks
from torch import Tensor

from cjepa_kernels import chunked, triton

torch.set_default_device(DEVICE)
_SKIPPED = pytest.StashKey[bool]()


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> Iterator[None]:
    """Give the same numbers on every machine, and use one core under pytest-xdist.

    The default dtype is set back, because a test that fails in fp64 must not make others fail.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill newly allocated memory with NaN, so that reading it before writing it shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every back end that is available here."""
    return str(request.param)


@pytest.fixture
def kernels_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail a test of the Triton back end that launches no Triton kernel.

    Whole modules use this fixture. It does nothing for other back ends. It skips fp64, which the
    chunked back end computes.
    """
    call = getattr(request.node, "callspec", None)
    parameters = call.params if call is not None else {}
    if "triton" not in (parameters.get("backend"), parameters.get("overload", "").lstrip(".")):
        yield
        return
    if parameters.get("dtype") == torch.float64:
        pytest.skip("the chunked back end computes fp64 and is tested under its own name")
    launches: list[str] = []
    launch = triton._call

    def counted(module: str, name: str, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        launches.append(name)
        return launch(module, name, args)

    monkeypatch.setattr(triton, "_call", counted)
    yield
    assert launches or request.node.stash.get(_SKIPPED, False), "no Triton kernel was launched"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell the fixtures of a test whether it was skipped."""
    report = yield
    if call.when == "call":
        item.stash[_SKIPPED] = report.skipped
    return report


@pytest.fixture(params=[1, 5, 4096], ids=["one_row", "five_rows", "whole"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of rows in a chunk of the chunked back end."""
    monkeypatch.setattr(chunked.nt_xent, "chunk_rows", lambda rows: min(rows, request.param))
    return int(request.param)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Start gloo processes when a test first asks for that many, and reuse them later."""
    started: dict[int, Ranks] = {}

    def of(count: int) -> Ranks:
        if count not in started or not started[count].alive:
            started[count] = Ranks(count)
        return started[count]

    yield of
    for processes in started.values():
        processes.close()
