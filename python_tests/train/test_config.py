"""Test experiment files: overrides, ranges, readable errors and the shipped examples."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from repository import ROOT

pytest.importorskip("pydantic")

from cjepa_kernels import ContrastiveJEPALoss, create_loss_from_config
from cjepa_kernels.files import atomic_path, atomic_write, remove_partial_files
from cjepa_kernels.train.config import (
    ExperimentConfig,
    apply_overrides,
    config_from_dict,
    config_to_dict,
    differing_keys,
    load_config,
)

CONFIGS = ROOT / "configs"


@pytest.mark.parametrize("name", ["cjepa.yaml", "cifar10.yaml"])
def test_shipped_experiment_is_valid_and_builds_its_loss(name: str) -> None:
    config = load_config(CONFIGS / name)
    loss = create_loss_from_config(config.loss)
    assert isinstance(loss, ContrastiveJEPALoss)
    assert loss.contrastive_weight == 0.1


def test_complete_experiment_shows_every_key() -> None:
    written = yaml.safe_load((CONFIGS / "cjepa.yaml").read_text())
    defaults = config_to_dict(ExperimentConfig())
    assert written.keys() == defaults.keys()
    for section in written.keys() - {"seed", "loss"}:
        assert written[section].keys() == defaults[section].keys(), section
    assert set(written["loss"]) == {
        *("type", "use_contrastive", "contrastive_weight", "contrastive_temperature"),
        *("use_cosine_similarity", "contrastive_on_context", "jepa_weight", "jepa_loss_type"),
        *("hierarchy_weights", "num_hierarchies", "normalize_embeddings", "target_norm"),
        *("smoothl1_beta", "huber_delta", "detach_targets", "reduction", "eps", "backend"),
        *("gather_distributed", "strategy", "contrastive_type"),
    }


def test_baseline_is_one_override_away() -> None:
    config = load_config(CONFIGS / "cjepa.yaml", ["loss.contrastive_weight=0"])
    loss = create_loss_from_config(config.loss)
    assert isinstance(loss, ContrastiveJEPALoss)
    assert (loss.contrastive_weight, loss.jepa_weight) == (0, 1.0)


def test_overrides_are_yaml(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text("trainer:\n  epochs: 3\n")
    config = load_config(
        file,
        [
            "trainer.epochs=7",
            "optimizer.learning_rate=1e-3",
            "loss.eps=1e-6",
            "data.pretrain_classes=[2, 0]",
            "optimizer.gradient_clip=null",
            "data.source=parquet:a=b.parquet",
        ],
    )
    assert config.trainer.epochs == 7
    assert config.optimizer.learning_rate == 1e-3
    assert config.loss["eps"] == 1e-6
    assert config.data.pretrain_classes == [0, 2]
    assert config.optimizer.gradient_clip is None
    assert config.data.source == "parquet:a=b.parquet"


def test_empty_file_is_the_default_experiment(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text("# nothing\n")
    assert load_config(file) == ExperimentConfig()


def test_plain_values_round_trip() -> None:
    config = apply_overrides(ExperimentConfig(), ["seed=4", "views.crop_area=[0.3, 1.0]"])
    values = config_to_dict(config)
    assert yaml.safe_load(yaml.safe_dump(values)) == values
    assert config_from_dict(values) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("trainer.epoch=3", r"trainer\.epoch: unknown key.*'epochs'", id="key"),
        pytest.param("trainr.epochs=3", r"trainr: unknown key.*'trainer'", id="section"),
        pytest.param("trainer.epochs=0", r"trainer\.epochs: .*1, got 0", id="too-small"),
        pytest.param("trainer.epochs=x", r"trainer\.epochs: .*integer.*'x'", id="not-a-number"),
        pytest.param("trainer.epochs=yes", r"trainer\.epochs: a boolean.*True", id="boolean"),
        pytest.param("trainer.precision=8", r"trainer\.precision: .*'32-true'.*8", id="choice"),
        pytest.param("views.flip=1.5", r"views\.flip: .*1, got 1\.5", id="probability"),
        pytest.param("views.scale=[2,1]", r"views\.scale: .*low <= high.*\[2, 1\]", id="range"),
        pytest.param(
            "views.crop_area=[0.5,2]", r"views\.crop_area: .*0\.01 <= low <= high <= 1", id="crop"
        ),
        pytest.param("optimizer.learning_rate=.nan", r"learning_rate: .*finite", id="nan"),
        pytest.param("optimizer.learning_rate=1e-9", r"min_learning_rate.*1e-05", id="rates"),
        pytest.param("model.heads=5", r"model: heads must divide dim.*5.*64", id="heads"),
        pytest.param("model.dim=62", r"heads=4 and dim=62", id="dim"),
        pytest.param("trainer.devices=3", r"batch_size=64 and devices=3", id="devices"),
        pytest.param("data.source='parquet:'", r"data\.source: .*parquet:PATH", id="source"),
        pytest.param("data.pretrain_classes=[1,1]", r"pretrain_classes.*distinct", id="twice"),
        pytest.param("data.pretrain_classes=[]", r"pretrain_classes.*at least one", id="none"),
        pytest.param("data.pretrain_classes=most", r"pretrain_classes.*'half'.*most", id="word"),
        pytest.param("seed=-1", r"seed: .*0, got -1", id="seed"),
        pytest.param("seed=99999999999999999999999", r"seed: .*9223372036854775807", id="big-seed"),
        pytest.param("seed.value=1", r"seed is a value, not a section", id="not-a-section"),
        pytest.param("seed", r"expected key=value", id="no-value"),
        pytest.param("=3", r"expected key=value", id="no-key"),
        pytest.param("seed=[1", r"not valid YAML", id="bad-yaml"),
    ],
)
def test_bad_override_names_key_expectation_and_value(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({"seed": 0}, [override])


def test_every_problem_has_its_line() -> None:
    with pytest.raises(ValueError, match="not valid") as info:
        config_from_dict({"sed": 1, "trainer": {"epochs": -1}, "views": {"flip": "often"}})
    lines = str(info.value).splitlines()
    assert len(lines) == 4
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "views.flip",
        "trainer.epochs",
        "sed",
    ]


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("trainer: [", "not valid YAML", id="syntax"),
        pytest.param("- seed", "expected a mapping of sections, got list", id="list"),
        pytest.param("seed: 1\nseed: 2\n", "'seed' is given twice", id="duplicate"),
    ],
)
def test_bad_file(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(file)


def test_differing_keys_are_dotted() -> None:
    a = {"seed": 0, "trainer": {"epochs": 1, "devices": 1}}
    b = {"seed": 0, "trainer": {"epochs": 2, "devices": 1}, "loss": 3}
    assert differing_keys(a, b) == ["trainer.epochs: 1 -> 2", "loss: None -> 3"]


def test_atomic_write_replaces_or_leaves(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file.txt"
    atomic_write(file, "old")

    def fail_half_way() -> None:
        with atomic_path(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert file.read_text() == "old"
    atomic_write(file, b"new")
    assert file.read_text() == "new"
    (file.parent / ".file.txt.0123456789ab.partial").write_text("left behind")
    (file.parent / ".download.partial").write_text("of another program")
    remove_partial_files(tmp_path)
    names = sorted(path.name for path in file.parent.iterdir())
    assert names == [".download.partial", "file.txt"]
