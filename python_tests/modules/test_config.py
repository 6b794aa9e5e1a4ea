"""create_loss_from_config builds both methods, fills in defaults and gives helpful errors."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from repository import ROOT

from cjepa_kernels import (
    ContrastiveJEPALoss,
    HJEPALoss,
    NTXentLoss,
    create_cjepa_loss_from_config,
    create_loss_from_config,
)
from cjepa_kernels.backends import BackendStatus
from cjepa_kernels.config import LOSS_KEYS, check_loss_section
from cjepa_kernels.suggestions import edits, nearest

CONFIGS = ROOT / "configs"
KEYS: dict[str, Any] = {
    "jepa_weight": 0.9,
    "contrastive_type": "dcl",
    "contrastive_weight": 0.2,
    "contrastive_temperature": 0.07,
    "use_cosine_similarity": False,
    "contrastive_on_context": True,
    "jepa_loss_type": "huber",
    "hierarchy_weights": [1.0, 0.5],
    "num_hierarchies": 2,
    "normalize_embeddings": False,
    "target_norm": "layer",
    "smoothl1_beta": 0.25,
    "huber_delta": 0.5,
    "detach_targets": False,
    "reduction": "sum",
    "eps": 1e-6,
    "backend": "chunked",
    "gather_distributed": True,
    "strategy": "ring",
}


@pytest.mark.parametrize(
    "method",
    [
        {"type": "cjepa"},
        {"type": "contrastive_jepa"},
        {"type": "CJEPA", "use_contrastive": True},
        {"type": "hjepa", "use_contrastive": True},
        {"type": "jepa", "use_contrastive": True},
        {"use_contrastive": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("wrap", [False, True], ids=["section", "experiment"])
def test_every_key_reaches_the_loss(method: dict[str, Any], wrap: bool) -> None:
    section = {**method, **KEYS}
    assert set(section) | {"type", "use_contrastive"} == LOSS_KEYS
    loss = create_loss_from_config({"loss": section, "seed": 3} if wrap else section)
    assert isinstance(loss, ContrastiveJEPALoss)
    jepa, contrastive = loss.jepa_loss, loss.contrastive
    assert isinstance(jepa, HJEPALoss)
    assert (loss.jepa_weight, loss.contrastive_weight) == (0.9, 0.2)
    assert loss.contrastive_on_context is True
    assert (contrastive.temperature, contrastive.use_cosine_similarity) == (0.07, False)
    assert (contrastive.reduction, contrastive.eps, contrastive.backend) == ("sum", 1e-6, "chunked")
    assert isinstance(contrastive, NTXentLoss)
    assert (loss.distributed, contrastive.strategy) == (True, "ring")
    assert contrastive.decoupled
    assert (jepa.loss_type, jepa.hierarchy_weights) == ("huber", [1.0, 0.5])
    assert (jepa.normalize_embeddings, jepa.target_norm) == (False, "layer")
    assert (jepa.huber_delta, jepa.smoothl1_beta) == (0.5, 0.25)
    assert (jepa.detach_targets, jepa.eps) == (False, 1e-6)


@pytest.mark.parametrize(
    ("kind", "loss_type"),
    [("hjepa", "smoothl1"), ("jepa", "smoothl1"), ("smoothl1", "smoothl1"), ("mse", "mse")],
)
def test_jepa_alone(kind: str, loss_type: str) -> None:
    loss = create_loss_from_config({"type": kind})
    assert isinstance(loss, HJEPALoss)
    assert loss.loss_type == loss_type
    wrapped = create_loss_from_config({"type": kind, "use_contrastive": True})
    assert isinstance(wrapped, ContrastiveJEPALoss)
    assert wrapped.jepa_loss.loss_type == loss_type


def test_defaults_are_those_of_the_modules() -> None:
    loss = create_loss_from_config({"type": "cjepa"})
    assert repr(loss) == repr(ContrastiveJEPALoss(HJEPALoss()))


def test_number_of_levels_comes_from_the_model_section_or_the_weights() -> None:
    from_model = create_loss_from_config({"loss": {}, "model": {"num_hierarchies": 4}})
    assert from_model.jepa_loss.num_hierarchies == 4
    from_weights = create_loss_from_config({"hierarchy_weights": [1, 1]})
    assert from_weights.jepa_loss.num_hierarchies == 2


def test_wrapping_a_loss_that_exists() -> None:
    jepa = HJEPALoss(num_hierarchies=1)
    loss = create_cjepa_loss_from_config({"loss": {"contrastive_weight": 0.3}}, jepa)
    assert loss.jepa_loss is jepa
    assert loss.contrastive_weight == 0.3
    same = create_cjepa_loss_from_config({"type": "cjepa", "use_contrastive": False}, jepa)
    assert same.jepa_loss is jepa


def test_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "loss.yaml"
    path.write_text("loss:\n  type: cjepa\n  contrastive_weight: 0.25\n")
    for form in (path, str(path)):
        assert create_loss_from_config(form).contrastive_weight == 0.25


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_build_and_list_every_key(path: Path) -> None:
    loss = create_loss_from_config(path)
    assert isinstance(loss, ContrastiveJEPALoss)
    assert loss.contrastive_on_context, "features of the EMA target would train nothing"
    if path.stem == "cjepa":
        assert set(yaml.safe_load(path.read_text())["loss"]) == LOSS_KEYS


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"contrastive_wieght": 1}, ValueError, "did you mean 'contrastive_weight'"),
        ({"zzz": 1}, ValueError, "zzz: unknown key; known: backend"),
        ({"type": "cjepaa"}, ValueError, "type: no type 'cjepaa', did you mean 'cjepa'"),
        ({"type": 3}, ValueError, "type: no type 3; known: "),
        ({"type": "cjepa", "use_contrastive": False}, ValueError, "use_contrastive: must not be"),
        (
            {"use_contrastive": "yes"},
            TypeError,
            "use_contrastive: must be true or false, got 'yes'",
        ),
        (
            {"contrastive_temperature": -1},
            ValueError,
            "contrastive_temperature: must lie between .*-1",
        ),
        ({"hierarchy_weights": [1, 2], "num_hierarchies": 3}, ValueError, "got 2"),
        (
            {"contrastive_type": "simclr"},
            ValueError,
            r"contrastive_type: must be one of \['nt_xent', 'dcl', 'info_nce', 'sup_con'\], got 's",
        ),
        ({"jepa_loss_type": "l1"}, ValueError, "jepa_loss_type: must be one of"),
        ({"loss": 3}, TypeError, "loss section must be a mapping, got 3"),
        (3, TypeError, "config must be a mapping or a path, got int"),
        ("missing.yaml", FileNotFoundError, "existing YAML file, got 'missing.yaml'"),
    ],
    ids=str,
)
def test_bad_configurations(config: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        create_loss_from_config(config)


@pytest.mark.parametrize(
    ("section", "ignored"),
    [
        ({"type": "mse", "vicreg_weight": 0.5}, "loss.vicreg_weight: ignored"),
        ({"type": "mse", "use_vicreg": True, "vicreg": {"std_coeff": 1.0}}, "loss.vicreg: ignored"),
        ({"type": "smoothl1", "use_vicreg": False}, "loss.use_vicreg: ignored"),
        (
            {"type": "smoothl1", "use_vicreg": False, "use_sigreg": False},
            "loss.use_sigreg: ignored",
        ),
        ({"type": "hjepa", "jepa_loss_type": "huber", "vicreg_variance_weight": 2.0}, "variance_w"),
        ({"type": "cjepa", "use_contrastive": True, "use_vicreg": True}, "type 'cjepa'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_keys_that_hjepa_ignores_are_named_once(section: dict[str, Any], ignored: str) -> None:
    ours = {key: value for key, value in section.items() if "reg" not in key}
    experiment = {"model": {"num_hierarchies": 2}, "loss": {**section, "hierarchy_weights": [1, 2]}}
    with pytest.warns(UserWarning, match=ignored) as warned:
        loss = create_loss_from_config(experiment)
    assert len(warned) == 1
    assert all(f"loss.{key}" in str(warned[0].message) for key in section.keys() - ours.keys())
    expected = create_loss_from_config({**ours, "hierarchy_weights": [1, 2]})
    assert repr(loss) == repr(expected)
    with pytest.warns(UserWarning, match=ignored):
        assert check_loss_section(experiment) == {**ours, "hierarchy_weights": [1, 2]}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"type": "combined", "vicreg_weight": 0.1, "use_smoothl1": False}, "'hjepa' is the predi"),
        ({"type": "hierarchical_combined"}, "there is no VICReg here"),
        ({"type": "vicreg", "vicreg_variance_weight": 25.0}, "there is no VICReg here"),
        ({"type": "sigreg", "sigreg_weight": 25.0, "flatten_patches": True}, "no SIGReg here"),
        ({"type": "hjepa_sigreg", "sigreg_vectorized": True}, "there is no SIGReg here"),
        ({"type": "ijepa"}, "num_hierarchies: 1 and target_norm: layer"),
        ({"type": "huber"}, "jepa_loss_type: huber"),
        ({"type": "SimCLR"}, "NTXentLoss"),
        ({"vicreg_weight": 0.1}, "missing beside vicreg_weight, where H-JEPA takes 'combined'"),
    ],
    ids=lambda value: str(value.get("type")) if isinstance(value, dict) else "",
)
def test_types_of_others_are_refused_with_what_there_is(
    section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^loss\.type: [^\n]*" + re.escape(message)):
        create_loss_from_config({"loss": section})


def test_every_mistake_has_its_line_with_its_dotted_key() -> None:
    section = {
        "contrastive_temperature": -1,
        "eps": 1e30,
        "hierarchy_weights": [1.0, float("nan")],
        "strategy": "tree",
        "contrastive_wieght": 1,
        "vicreg_weight": 1,
        "type": "cjepa",
    }
    with pytest.raises(ValueError, match=r"^loss\.contrastive_temperature: must lie") as info:
        create_loss_from_config({"loss": section})
    lines = str(info.value).splitlines()
    assert tuple(lines) == tuple(info.value.problems)  # type: ignore[attr-defined]
    assert [line.partition(": ")[0] for line in lines] == [
        *("loss.contrastive_temperature", "loss.eps", "loss.hierarchy_weights", "loss.strategy"),
        "loss.contrastive_wieght",
    ]
    assert lines[-1].endswith("unknown key, did you mean 'contrastive_weight'?")
    assert lines[1] == "loss.eps: must lie between 1e-30 and 1, got 1e+30"


def test_two_sections_that_disagree_about_the_levels_are_refused() -> None:
    config = {"model": {"num_hierarchies": 2}, "loss": {"num_hierarchies": 3}}
    with pytest.raises(ValueError, match=r"loss\.num_hierarchies: 3 is not model.num_hier.*2"):
        create_loss_from_config(config)


def test_a_missing_back_end_is_named_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    status = BackendStatus(available=False, devices=(), reason="it is not built")
    # The package binds a function to the name of this module, so it is looked up by its path.
    module = sys.modules["cjepa_kernels.backends"]
    monkeypatch.setitem(module._statuses, "native", status)
    with pytest.raises(RuntimeError, match=r'^loss\.backend: backend "native" was asked for'):
        create_loss_from_config({"loss": {"backend": "native"}})
    assert check_loss_section({"loss": {"backend": "native"}}) == {"backend": "native"}


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("contrastive_wieght", ", did you mean 'contrastive_weight'?"),
        ("epoch", ", did you mean 'epochs'?"),
        ("EPOCHS", ", did you mean 'epochs'?"),
        ("batchsize", ", did you mean 'batch_size'?"),
        ("vicreg_weight", "; known: batch_size, contrastive_weight, dim, epochs, jepa_weight"),
        ("lr", "; known: batch_size, contrastive_weight, dim, epochs, jepa_weight"),
        ("dmi", ", did you mean 'dim'?"),
        ("dd", "; known: batch_size, contrastive_weight, dim, epochs, jepa_weight"),
        (3, "; known: batch_size, contrastive_weight, dim, epochs, jepa_weight"),
    ],
)
def test_suggestions_are_for_typing_errors_alone(name: object, answer: str) -> None:
    known = ["epochs", "batch_size", "jepa_weight", "contrastive_weight", "dim"]
    assert nearest(name, known) == answer


def test_long_lists_of_names_are_shortened() -> None:
    answer = nearest("x", [f"column{k:03}" for k in range(100)])
    assert answer.startswith("; known: column000, column001, ")
    assert answer.endswith("column023 and 76 more")
    assert nearest("x", []) == ""


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("a", "", 1),
        ("ab", "ba", 1),
        ("kitten", "sitting", 3),
        ("weight", "wieght", 1),
        ("abcdef", "badcfe", 3),
        ("ca", "abc", 3),  # optimal string alignment never edits a part twice
        ("short", "much longer", 3),
    ],
)
def test_edits(a: str, b: str, distance: int) -> None:
    assert edits(a, b) == edits(b, a) == distance


def test_broken_yaml_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("loss: [")
    with pytest.raises(ValueError, match=r"broken\.yaml.*not valid YAML"):
        create_loss_from_config(path)


def test_exponents_are_numbers_and_keys_are_unique(tmp_path: Path) -> None:
    path = tmp_path / "loss.yaml"
    path.write_text("loss: {type: cjepa, eps: 1e-6}")
    assert create_loss_from_config(path).eps == 1e-6
    path.write_text("loss:\n  eps: 1.0e-6\n  eps: 1.0e-7\n")
    with pytest.raises(ValueError, match="'eps' is given twice"):
        create_loss_from_config(path)
    path.write_bytes(b"loss: \xff")
    with pytest.raises(ValueError, match=r"loss\.yaml.*not valid YAML"):
        create_loss_from_config(path)


def test_signatures_are_the_documented_ones() -> None:
    """Code written for the first implementation relies on the order of positional arguments."""
    assert list(inspect.signature(ContrastiveJEPALoss).parameters)[:8] == [
        "jepa_loss",
        "jepa_weight",
        "contrastive_weight",
        "contrastive_temperature",
        "use_cosine_similarity",
        "contrastive_on_context",
        "reduction",
        "eps",
    ]
    assert list(inspect.signature(HJEPALoss).parameters)[:8] == [
        "loss_type",
        "hierarchy_weights",
        "num_hierarchies",
        "reduction",
        "normalize_embeddings",
        "huber_delta",
        "eps",
        "detach_targets",
    ]
