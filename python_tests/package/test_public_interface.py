"""The public interface contains all that is recorded, and the comparison finds breaking changes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import public_interface
import pytest
from public_interface import RECORD, differences

from cjepa_kernels import modules

Interface = dict[str, Any]


@pytest.fixture(scope="module")
def recorded() -> Interface:
    interface: Interface = json.loads(RECORD.read_text(encoding="utf-8"))
    return interface


def test_the_public_interface_is_kept(recorded: Interface) -> None:
    assert differences(recorded, public_interface.describe()) == []


def test_the_record_covers_every_part(recorded: Interface) -> None:
    assert {"cjepa_kernels.nt_xent", "cjepa_kernels.tokens.cls_tokens"} <= set(recorded["names"])
    assert set(recorded["signatures"]) <= set(recorded["names"])
    assert set(recorded["modules"]) == {f"cjepa_kernels.{name}" for name in modules.__all__}
    assert len(recorded["operators"]) >= 38
    assert len(recorded["loss_keys"]) >= 20
    assert len(recorded["experiment_keys"]) >= 56
    commands = {"bench", "compare", "data", "info", "probe", "train", "tune"}
    assert commands <= set(recorded["commands"])
    assert set(recorded["distribution"]["extras"]) >= {"bench", "train", "triton", "yaml"}
    assert "CJEPA_KEPT_MIB" in recorded["environment"]


def _rename_argument(interface: Interface) -> None:
    interface["signatures"]["cjepa_kernels.nt_xent"][2]["name"] = "tau"


def _change_default(interface: Interface) -> None:
    interface["signatures"]["cjepa_kernels.nt_xent"][2]["default"] = "0.5"


def _make_positional(interface: Interface) -> None:
    interface["signatures"]["cjepa_kernels.nt_xent"][0]["kind"] = "POSITIONAL_ONLY"


def _swap_arguments(interface: Interface) -> None:
    parameters = interface["signatures"]["cjepa_kernels.prediction_loss"]
    parameters[0], parameters[1] = parameters[1], parameters[0]


def _add_required_argument(interface: Interface) -> None:
    new = {"name": "margin", "kind": "KEYWORD_ONLY"}
    interface["signatures"]["cjepa_kernels.nt_xent"].append(new)


def _insert_argument(interface: Interface) -> None:
    new = {"name": "margin", "kind": "POSITIONAL_OR_KEYWORD", "default": "0.0"}
    interface["signatures"]["cjepa_kernels.NTXentLoss"].insert(1, new)


def _change_schema(old: str, new: str) -> Callable[[Interface], None]:
    def change(interface: Interface) -> None:
        schema = interface["operators"]["cjepa_kernels::nt_xent.chunked"]
        assert old in schema
        interface["operators"]["cjepa_kernels::nt_xent.chunked"] = schema.replace(old, new)

    return change


BREAKING: dict[str, tuple[Callable[[Interface], object], str]] = {
    "name": (lambda i: i["names"].remove("cjepa_kernels.backends"), "backends: removed"),
    "argument": (_rename_argument, "nt_xent: argument temperature: removed"),
    "default": (_change_default, "nt_xent: argument temperature: was"),
    "kind": (_make_positional, "nt_xent: argument z_i: was"),
    "order": (_swap_arguments, "prediction_loss: positions were"),
    "required_argument": (_add_required_argument, "nt_xent: argument margin: new, and without"),
    "inserted_argument": (_insert_argument, "NTXentLoss: positions were"),
    "field": (
        lambda i: i["fields"]["cjepa_kernels.NTXentOutput"].append("margin"),
        "fields of cjepa_kernels.NTXentOutput: was",
    ),
    "method": (
        lambda i: i["modules"]["cjepa_kernels.NTXentLoss"]["methods"].pop("reset_parameters"),
        "method reset_parameters: removed",
    ),
    "property": (
        lambda i: i["modules"]["cjepa_kernels.NTXentLoss"]["settable"].remove("temperature"),
        "settable property temperature: removed",
    ),
    "attribute": (
        lambda i: i["modules"]["cjepa_kernels.HJEPALoss"]["attributes"].remove("target_norm"),
        "attribute target_norm: removed",
    ),
    "result": (
        lambda i: i["modules"]["cjepa_kernels.HJEPALoss"]["results"].remove("loss_h0"),
        "result loss_h0: removed",
    ),
    "state": (
        lambda i: i["modules"]["cjepa_kernels.HJEPALoss"]["state"].append("weights"),
        "HJEPALoss: state: was",
    ),
    "operator": (
        lambda i: i["operators"].pop("cjepa_kernels::pad_tokens"),
        "operator cjepa_kernels::pad_tokens: removed",
    ),
    "schema_argument": (_change_schema("float eps", "float epsilon"), "nt_xent.chunked: was"),
    "schema_type": (_change_schema("Tensor? mask", "Tensor mask"), "nt_xent.chunked: was"),
    "schema_result": (_change_schema("Tensor lse", "Tensor logits"), "nt_xent.chunked: was"),
    "schema_required": (_change_schema("bool keep)", "bool keep, int k)"), "nt_xent.chunked: was"),
    "loss_key": (lambda i: i["loss_keys"].pop("eps"), "key of the loss section eps: removed"),
    "loss_default": (
        lambda i: i["loss_keys"].update(jepa_weight="2.0"),
        "loss section jepa_weight: was '1.0', is '2.0'",
    ),
    "experiment_key": (
        lambda i: i["experiment_keys"].pop("trainer.threads"),
        "trainer.threads: removed",
    ),
    "experiment_default": (
        lambda i: i["experiment_keys"]["trainer.epochs"].update(default=50),
        "trainer.epochs: default was 40, is 50",
    ),
    "experiment_type": (
        lambda i: i["experiment_keys"]["trainer.threads"]["takes"].remove("null"),
        "trainer.threads: type null: removed",
    ),
    "command": (lambda i: i["commands"].pop("tune"), "command tune: removed"),
    "option": (lambda i: i["commands"]["train"].pop("--out"), "train: parameter --out: removed"),
    "option_default": (
        lambda i: i["commands"]["compare"]["--seeds"].update(default="0"),
        "--seeds: default was '0,1,2', is '0'",
    ),
    "required_option": (
        lambda i: i["commands"]["info"].update({"--all": {"required": True}}),
        "info: --all: new, and required",
    ),
    "module": (lambda i: i["run_as_modules"].clear(), "python -m cjepa_kernels.bench: removed"),
    "extra": (lambda i: i["distribution"]["extras"].pop("yaml"), "extra yaml: removed"),
    "package": (
        lambda i: i["distribution"]["extras"]["train"].remove("lightning"),
        "extra train: package lightning: removed",
    ),
    "dependency": (
        lambda i: i["distribution"]["dependencies"].append("numpy"),
        "dependencies: was",
    ),
    "script": (lambda i: i["distribution"]["scripts"].clear(), "script cjepa: removed"),
    "variable": (
        lambda i: i["environment"].remove("CJEPA_NO_NATIVE"),
        "variable CJEPA_NO_NATIVE: removed",
    ),
}


@pytest.mark.parametrize("change", BREAKING)
def test_a_change_that_breaks_callers_is_found(change: str, recorded: Interface) -> None:
    mutate, message = BREAKING[change]
    present = copy.deepcopy(recorded)
    mutate(present)
    lines = differences(recorded, present)
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_additions_break_nobody(recorded: Interface) -> None:
    present = copy.deepcopy(recorded)
    present["names"].append("cjepa_kernels.another")
    present["signatures"]["cjepa_kernels.another"] = []
    keyword = {"name": "margin", "kind": "KEYWORD_ONLY", "default": "0.0"}
    present["signatures"]["cjepa_kernels.nt_xent"].insert(3, keyword)
    present["modules"]["cjepa_kernels.HJEPALoss"]["results"].append("loss_h9")
    present["operators"]["cjepa_kernels::another"] = "cjepa_kernels::another(Tensor x) -> Tensor"
    _change_schema("bool keep)", "bool keep, int k=0)")(present)
    present["loss_keys"]["margin"] = "0.0"
    present["experiment_keys"]["trainer.margin"] = {"takes": ["float"], "default": 0.0}
    present["experiment_keys"]["trainer.precision"]["takes"].append("'64-true'")
    present["commands"]["info"]["--all"] = {"required": False}
    present["commands"]["another"] = {}
    present["distribution"]["extras"]["train"].append("another")
    present["environment"].append("CJEPA_ANOTHER")
    assert differences(recorded, present) == []
