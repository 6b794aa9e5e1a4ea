"""Without the compiled kernels, the first call on the CPU gives a warning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cjepa_kernels import NTXentLoss, cross_logsumexp, nt_xent, prediction_loss
from cjepa_kernels.functional import dispatch
from cjepa_kernels.ops import registry

# In the package, ``backends`` is the name of a function, so the module is imported by its path.
module: Any = importlib.import_module("cjepa_kernels.backends")
CALLS: dict[str, Callable[..., Any]] = {
    "nt_xent": lambda **options: nt_xent(torch.eye(3), torch.eye(3), **options),
    "cross_logsumexp": lambda **options: cross_logsumexp(torch.eye(3), torch.eye(3), **options),
    "prediction_loss": lambda **options: prediction_loss(torch.eye(3), torch.eye(3), **options),
    "module": lambda **options: NTXentLoss(**options)(torch.eye(3), torch.eye(3)),
}


@pytest.fixture(autouse=True)
def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(registry.dispatched, "cpu", raising=False)
    monkeypatch.setattr(module, "_NATIVE_REASON", "the reason that backends() gives")
    monkeypatch.setattr(module, "_warned", False)
    monkeypatch.delenv("CJEPA_NO_NATIVE", raising=False)


@pytest.fixture
def caught() -> Any:
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        yield recorded


@pytest.mark.parametrize("name", CALLS)
def test_the_first_use_warns_once(name: str, caught: list[warnings.WarningMessage]) -> None:
    for _ in range(2):
        for call in (CALLS[name], *CALLS.values()):
            call()
    assert len(caught) == 1
    assert caught[0].category is UserWarning
    assert caught[0].filename == __file__, "the warning must point to the line of the caller"
    message = str(caught[0].message)
    assert message.startswith('backend="auto" takes the slower back end "chunked" on the CPU')
    assert "the reason that backends() gives" in message


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_a_back_end_that_was_asked_for_warns_of_nothing(
    name: str, backend: str, caught: list[warnings.WarningMessage]
) -> None:
    CALLS[name](backend=backend)
    assert not caught


def test_other_devices_warn_of_nothing(caught: list[warnings.WarningMessage]) -> None:
    assert dispatch.choose_overload("auto", torch.device("cuda")) == ""
    assert dispatch.choose_overload("auto", torch.device("meta")) == ""
    assert not caught


@pytest.mark.parametrize(("value", "expected"), [("1", 0), ("0", 1), ("", 1)])
def test_the_users_choice_of_pure_python_is_silent(
    value: str,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
    caught: list[warnings.WarningMessage],
) -> None:
    monkeypatch.setenv("CJEPA_NO_NATIVE", value)
    CALLS["nt_xent"]()
    assert len(caught) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_of_many_ranks_the_first_one_warns(
    rank: int, monkeypatch: pytest.MonkeyPatch, caught: list[warnings.WarningMessage]
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    CALLS["nt_xent"]()
    assert len(caught) == (rank == 0)


def test_warnings_that_are_errors_raise_once() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="slower back end"):
            CALLS["nt_xent"]()
        assert CALLS["nt_xent"]().accuracy == 1


def test_no_graph_breaks_at_the_warning(caught: list[warnings.WarningMessage]) -> None:
    """A compiled call warns while the compiler traces it, and stays one graph."""
    torch._dynamo.reset()
    z_i, z_j = torch.randn(2, 5, 4)
    step = torch.compile(lambda a, b: nt_xent(a, b).loss * 2, backend="eager", fullgraph=True)
    assert step(z_i, z_j) == 2 * nt_xent(z_i, z_j, backend="chunked").loss
    step(z_i, z_j)
    assert len([w for w in caught if "slower back end" in str(w.message)]) == 1


def test_a_module_that_cannot_be_loaded_is_not_called_unbuilt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(name: str) -> None:
        raise ImportError("undefined symbol: aoti_torch_new")

    monkeypatch.setattr(importlib, "import_module", fail)
    loaded, reason = module._find_compiled()
    assert loaded is None
    assert "cannot be loaded (undefined symbol: aoti_torch_new)" in reason


def test_a_module_that_is_not_there_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ModuleNotFoundError("No module named 'cjepa_kernels._C'")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert "not built" in module._find_compiled()[1]
