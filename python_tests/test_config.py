"""create_loss_from_config: both methods, defaults, and errors that help."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml

from cjepa_kernels import (
    ContrastiveJEPALoss,
    HJEPALoss,
    create_cjepa_loss_from_config,
    create_loss_from_config,
)
from cjepa_kernels.config import LOSS_KEYS

CONFIGS = Path(__file__).parent.parent / "configs"
KEYS: dict[str, Any] = {
    "jepa_weight": 0.9,
    "contrastive_weight": 0.2,
    "contrastive_temperature": 0.07,
    "use_cosine_similarity": False,
    "contrastive_on_context": True,
    "jepa_loss_type": "huber",
    "hierarchy_weights": [1.0, 0.5],
    "num_hierarchies": 2,
    "normalize_embeddings": False,
    "target_norm": "layer",
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
    assert (contrastive.distributed, contrastive.strategy) == (True, "ring")
    assert (jepa.loss_type, jepa.hierarchy_weights) == ("huber", [1.0, 0.5])
    assert (jepa.normalize_embeddings, jepa.target_norm) == (False, "layer")
    assert (jepa.huber_delta, jepa.detach_targets, jepa.eps) == (0.5, False, 1e-6)


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
        ({"zzz": 1}, ValueError, "unknown key 'zzz'.*known: .*backend"),
        ({"type": "cjepaa"}, ValueError, "unknown loss type 'cjepaa', did you mean 'cjepa'"),
        ({"type": 3}, ValueError, "unknown loss type 3; known: "),
        ({"type": "cjepa", "use_contrastive": False}, ValueError, "use_contrastive must not be"),
        ({"use_contrastive": "yes"}, TypeError, "use_contrastive must be true or false, got 'yes'"),
        ({"contrastive_temperature": -1}, ValueError, "Temperature must be positive.*-1"),
        ({"hierarchy_weights": [1, 2], "num_hierarchies": 3}, ValueError, "got 2"),
        ({"jepa_loss_type": "l1"}, ValueError, "loss_type must be one of"),
        ({"loss": 3}, TypeError, "loss section must be a mapping, got 3"),
        (3, TypeError, "config must be a mapping or a path, got int"),
        ("missing.yaml", FileNotFoundError, "existing YAML file, got 'missing.yaml'"),
    ],
    ids=str,
)
def test_bad_configurations(config: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        create_loss_from_config(config)


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
    """Positional order is part of the contract with code written for the first implementation."""
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
