"""Which Gluon kernels and launch plans a call may use: the table, the variables, the sentences."""

from __future__ import annotations

import importlib
import typing
from typing import Any

import pytest
import torch
from repository import ROOT

import cjepa_kernels
from cjepa_kernels import backends, environment
from cjepa_kernels.backends import BackendStatus
from cjepa_kernels.triton import proved
from cjepa_kernels.triton.proved import Feature, Proof

FEATURES: tuple[Feature, ...] = typing.get_args(Feature)
PROOF = Proof(
    feature="gluon",
    architecture=90,
    dtype="bfloat16",
    smallest_features=65,
    largest_features=256,
    operator="nt_xent",
    direction="forward",
    triton="3.6",
    record="a.json",
)
CALL: dict[str, Any] = {
    "architecture": 90,
    "dtype": torch.bfloat16,
    "features": 256,
    "operator": "nt_xent",
    "direction": "forward",
}
OTHER_CALLS: list[dict[str, Any]] = [
    {"architecture": 100},
    {"dtype": torch.float16},
    {"features": 64},
    {"features": 257},
    {"operator": "cross_logsumexp"},
    {"direction": "backward"},
]


@pytest.fixture(autouse=True)
def one_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of one entry, Triton 3.6, and no variable."""
    monkeypatch.setattr(proved, "proofs", lambda: (PROOF,))
    monkeypatch.setattr(proved, "_triton_minor", lambda: "3.6")
    for variable in proved.SWITCHES.values():
        monkeypatch.delenv(variable, raising=False)


def test_every_entry_of_the_table_has_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for proof in proved.proofs():
        for field in ("feature", "direction"):
            allowed = typing.get_args(typing.get_type_hints(Proof)[field])
            assert getattr(proof, field) in allowed, proof
        assert isinstance(getattr(torch, proof.dtype), torch.dtype), proof
        assert hasattr(torch.ops.cjepa_kernels, proof.operator), proof
        assert 1 <= proof.smallest_features <= proof.largest_features, proof
        assert (ROOT / "bench" / "results" / proof.record).is_file(), proof


def test_the_entry_is_proved() -> None:
    assert proved.is_proved("gluon", **CALL)
    assert proved.is_allowed("gluon", **CALL)
    assert proved.is_proved("gluon", **{**CALL, "features": 65})


@pytest.mark.parametrize("other", OTHER_CALLS, ids=str)
def test_another_combination_is_not_proved(other: dict[str, Any]) -> None:
    assert not proved.is_proved("gluon", **{**CALL, **other})


def test_another_feature_or_version_of_triton_is_not_proved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not proved.is_proved("plans", **CALL)
    monkeypatch.setattr(proved, "_triton_minor", lambda: "3.60")
    assert not proved.is_proved("gluon", **CALL)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize(("value", "allowed"), [("1", True), ("0", False), (" 1\n", True)])
def test_the_variable_decides(
    feature: Feature, value: str, allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(proved.SWITCHES[feature], value)
    assert proved.is_allowed(feature, **CALL) == allowed
    assert proved.is_allowed(feature, **{**CALL, "dtype": torch.float16}) == allowed


@pytest.mark.parametrize("value", ["", " "], ids=repr)
def test_a_blank_variable_leaves_the_choice_to_the_table(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CJEPA_GLUON", value)
    monkeypatch.setenv("CJEPA_LAUNCH_PLANS", value)
    assert proved.is_allowed("gluon", **CALL)
    assert not proved.is_allowed("plans", **CALL)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("value", ["2", "yes", "true", "-1", "01"])
def test_another_value_is_an_error(
    feature: Feature, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    variable = proved.SWITCHES[feature]
    monkeypatch.setenv(variable, value)
    message = f"{variable} must be 0, 1 or unset, got '{value}'"
    with pytest.raises(ValueError, match=message):
        proved.is_allowed(feature, **CALL)
    monkeypatch.setattr(environment, "_problems", [])
    environment.check_switch_when_imported(variable)
    with pytest.raises(ValueError, match=message):
        cjepa_kernels.nt_xent(torch.eye(3), torch.eye(3))


def test_the_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proved.sentence("gluon", 90) == (
        "Gluon kernels are used where they have passed parity on a GPU of compute capability 9.0 "
        "with Triton 3.6: nt_xent forward in bfloat16 with 65 to 256 features"
    )
    assert proved.sentence("gluon", 80) == (
        "Gluon kernels are not used: none has passed parity on a GPU of compute capability 8.0 "
        "with Triton 3.6 (CJEPA_GLUON=1 uses them)"
    )
    monkeypatch.setenv("CJEPA_LAUNCH_PLANS", "0")
    assert proved.sentence("plans", 90) == "launch plans are switched off by CJEPA_LAUNCH_PLANS=0"
    monkeypatch.setenv("CJEPA_LAUNCH_PLANS", "1")
    assert proved.sentence("plans", 90) == (
        "launch plans are used also where they have not passed parity on a GPU "
        "(CJEPA_LAUNCH_PLANS=1)"
    )


@pytest.fixture
def on_a_hopper_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The status that the back end would have on a GPU of compute capability 9.0."""
    module = importlib.import_module("cjepa_kernels.backends")
    status = BackendStatus(available=True, devices=("cuda",), reason="Triton kernels")
    monkeypatch.setitem(module._statuses, "triton", status)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(proved, "triton_is_interpreted", lambda: False)


@pytest.mark.usefixtures("on_a_hopper_gpu")
def test_the_back_end_says_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = backends()["triton"].reason
    assert reason.startswith("Triton kernels; Gluon kernels are used where they have passed")
    assert "; launch plans are not used: none has passed parity" in reason
    monkeypatch.setenv("CJEPA_GLUON", "0")
    assert "Gluon kernels are switched off by CJEPA_GLUON=0" in backends()["triton"].reason


@pytest.mark.usefixtures("on_a_hopper_gpu")
def test_the_back_end_says_what_is_wrong_with_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CJEPA_GLUON", "maybe")
    assert backends()["triton"].reason.endswith("CJEPA_GLUON must be 0, 1 or unset, got 'maybe'")


@pytest.mark.usefixtures("on_a_hopper_gpu")
def test_the_interpreter_uses_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proved, "triton_is_interpreted", lambda: True)
    assert backends()["triton"].reason == "Triton kernels"


def test_a_back_end_that_is_missing_has_no_note(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("cjepa_kernels.backends")
    status = BackendStatus(available=False, devices=("cuda",), reason="no GPU")
    monkeypatch.setitem(module._statuses, "triton", status)
    assert backends()["triton"] == status
