"""Test training runs: resuming after a kill, run directories, saved encoders, several ranks."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from kill_and_resume import cjepa
from train_experiments import tiny, weights

from cjepa_kernels.backends import BackendStatus
from cjepa_kernels.train import runner
from cjepa_kernels.train.config import DataConfig, ExperimentConfig, config_to_dict
from cjepa_kernels.train.data.batches import EpochBatches
from cjepa_kernels.train.data.dataset import load_dataset
from cjepa_kernels.train.loop.checkpoints import AtomicCheckpointIO
from cjepa_kernels.train.loop.metric_history import DivergenceError, MetricHistory, to_csv
from cjepa_kernels.train.loop.module import CJEPAModule, build_loss
from cjepa_kernels.train.loop.run_directory import RunResult, load_result
from cjepa_kernels.train.model.vit import VisionTransformer

COMMAND = [sys.executable, "-m", "cjepa_kernels.cli", "train"]


NO_GPU = pytest.mark.skipif(
    torch.cuda.is_available() or torch.backends.mps.is_available(),
    reason="an accelerator is available",
)


def test_killed_run_resumes_to_identical_numbers(tmp_path: Path) -> None:
    config = tiny("trainer.epochs=12", "evaluation.every_n_epochs=5")
    uninterrupted = runner.train(config, tmp_path / "whole", progress_bar=False)

    killed_dir = tmp_path / "killed"
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps(config_to_dict(config)))
    process = cjepa("train", "--config", file, "--out", killed_dir, log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while not (killed_dir / "checkpoints" / "last.ckpt").is_file():
            assert process.is_alive(), "the run ended before its first checkpoint"
            assert time.monotonic() < deadline, "the run wrote no checkpoint within two minutes"
            time.sleep(0.005)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (killed_dir / "result.json").exists()
    epochs_before = len((killed_dir / "metrics.csv").read_text().splitlines()) - 1
    assert 1 <= epochs_before < 12
    (killed_dir / ".last.ckpt.0123456789ab.partial").write_text("half a file")

    resumed = runner.train(config, killed_dir, progress_bar=False)

    assert resumed.history == uninterrupted.history
    assert resumed.evaluation == uninterrupted.evaluation
    assert resumed.findings == uninterrupted.findings
    for name in ("metrics.csv", "log.txt", "config.yaml"):
        assert (killed_dir / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    expected, actual = weights(tmp_path / "whole"), weights(killed_dir)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    assert not list(killed_dir.rglob("*.partial"))
    checkpoint = torch.load(killed_dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 12 * 4


def test_kill_after_the_last_epoch_only_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            runner.train(config, tmp_path / "run", progress_bar=False)
    before = weights(tmp_path / "run")
    result = runner.train(config, tmp_path / "run", progress_bar=False)
    assert [row["epoch"] for row in result.history] == [1.0, 2.0]
    assert result.evaluation["mean/linear"] > 0
    for name, value in weights(tmp_path / "run").items():
        assert torch.equal(value, before[name]), name


def test_finished_run_is_loaded_and_not_trained(tmp_path: Path) -> None:
    config = tiny("loss.contrastive_weight=0", "evaluation.every_n_epochs=1")
    steps: list[int] = []
    first = runner.train(
        config, tmp_path, progress_bar=False, on_progress=lambda p: steps.append(p.step)
    )
    assert steps[-1] == 8
    steps.clear()
    second = runner.train(
        config, tmp_path, progress_bar=False, on_progress=lambda p: steps.append(p.step)
    )
    assert steps == []
    assert second == first
    assert first.history[-1]["term_ratio"] == 0.0
    assert 0 <= first.history[-1]["eval/mean/knn"] <= 100
    assert 0 < first.history[-1]["cls_effective_rank"] <= 16


def test_infinite_ratio_survives_the_result_file(tmp_path: Path) -> None:
    config = tiny("loss.jepa_weight=0", "trainer.epochs=1")
    trained = runner.train(config, tmp_path, progress_bar=False)
    assert trained.history[0]["term_ratio"] == float("inf")
    assert load_result(tmp_path) == trained
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)


def test_another_configuration_in_the_directory_names_the_keys(tmp_path: Path) -> None:
    runner.train(tiny("trainer.epochs=1"), tmp_path, progress_bar=False)
    with pytest.raises(ValueError, match=r"(?s)optimizer\.learning_rate: 0\.002 -> 0\.001") as info:
        runner.train(
            tiny("trainer.epochs=1", "optimizer.learning_rate=0.001"), tmp_path, progress_bar=False
        )
    assert "trainer" not in str(info.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(["trainer.batch_size=129"], r"trainer\.batch_size.*128.*129", id="batch"),
        pytest.param(["masking.visible=13"], r"masking\.visible.*16.*13 \+ 4", id="masks"),
        pytest.param(["masking.predicted=3"], r"masking\.predicted.*at least 4.*3", id="levels"),
        pytest.param(["model.patch_size=3"], r"model\.patch_size.*8 x 8.*3", id="patch"),
        pytest.param(["loss.contrastive_wieght=1"], "contrastive_weight", id="loss-key"),
        pytest.param(["loss.contrastive_temperature=-1"], "must lie between", id="temperature"),
        pytest.param(
            ["loss.contrastive_weight=0", "loss.jepa_weight=0"], "must not both be 0", id="no-loss"
        ),
        pytest.param(["loss.contrastive_type=simclr"], "contrastive_type: must be one", id="kind"),
        pytest.param(
            ["loss.contrastive_type=sup_con", "data.pretrain_classes=[3]"],
            r"contrastive_type.*data\.label_column.*all of one class",
            id="one-label",
        ),
        pytest.param(["loss.type=hjepa"], r"loss\.type.*contrastive_weight", id="loss-type"),
        pytest.param(["loss.reduction=none"], r"loss\.reduction", id="reduction"),
        pytest.param(["data.pretrain_classes=[0,10]"], r"pretrain_classes.*0\.\.9", id="classes"),
        pytest.param(
            ["data.pretrain_classes=[0,1,2,3,4,5,6,7,8]"], "leave at least 2 classes", id="transfer"
        ),
        pytest.param(["evaluation.max_train_images=1"], r"max_train_images.*got 1", id="probed"),
        pytest.param(
            ["loss.contrastive_on_context=false"],
            r"contrastive_on_context.*no gradient",
            id="targets",
        ),
        pytest.param(["trainer.precision=16-mixed"], r"trainer\.precision.*CPU", id="half"),
        pytest.param(
            ["trainer.precision=16-mixed", "trainer.accelerator=auto"],
            r"trainer\.precision.*CPU.*'auto'",
            id="half-auto",
            marks=NO_GPU,
        ),
        pytest.param(
            ["trainer.accelerator=gpu"], r"trainer\.accelerator.*'gpu'", id="gpu", marks=NO_GPU
        ),
    ],
)
def test_bad_experiment_stops_before_training(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        runner.train(tiny(*overrides), tmp_path / "run", progress_bar=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["sup_con", "dcl", "info_nce"])
def test_contrastive_types_train(kind: str, tmp_path: Path) -> None:
    config = tiny(f"loss.contrastive_type={kind}", "trainer.epochs=1")
    result = runner.train(config, tmp_path, progress_bar=False)
    assert math.isfinite(result.history[-1]["loss"])
    assert 0 <= result.history[-1]["contrastive_accuracy"] <= 1
    log = (tmp_path / "log.txt").read_text()
    assert ("trains with the labels of the training images" in log) == (kind == "sup_con")


@pytest.mark.parametrize("kind", ["nt_xent", "sup_con", "dcl", "info_nce"])
def test_every_contrastive_type_takes_several_devices(kind: str) -> None:
    """What the ranks then compute is tested in distributed/test_failures.py."""
    loss = build_loss(tiny("trainer.devices=2", f"loss.contrastive_type={kind}"))
    assert loss.contrastive.distributed is True


def test_sup_con_takes_the_labels_of_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    config = tiny("loss.contrastive_type=sup_con", "trainer.epochs=1")
    labels = load_dataset(config.data).train.labels
    transfer = CJEPAModule.on_after_batch_transfer

    def recorded(self: CJEPAModule, batch: Any, index: int) -> Any:
        views = transfer(self, batch, index)
        seen.append((batch.samples, views.labels))
        return views

    monkeypatch.setattr(CJEPAModule, "on_after_batch_transfer", recorded)
    runner.train(config, tmp_path, progress_bar=False)
    assert seen
    for samples, of_views in seen:
        assert torch.equal(of_views, labels[samples])


def test_one_class_stops_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_dataset(tiny().data)
    dataset.train.labels.zero_()
    monkeypatch.setattr(runner, "load_dataset", lambda *args, **options: dataset)
    with pytest.raises(ValueError, match="at least 2 classes"):
        runner.train(tiny(), tmp_path / "run", progress_bar=False)
    assert not (tmp_path / "run").exists()


def test_missing_back_end_is_a_value_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = BackendStatus(False, ("cpu",), "not built")
    # The attribute ``cjepa_kernels.backends`` is a function that hides the module of this name.
    module = sys.modules["cjepa_kernels.backends"]
    monkeypatch.setitem(module._statuses, "native", missing)
    with pytest.raises(ValueError, match=r"loss\.backend.*native.*not built"):
        runner.train(tiny("loss.backend=native"), tmp_path / "run", progress_bar=False)
    assert not (tmp_path / "run").exists()


def test_back_end_of_another_device_stops_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_gpus = BackendStatus(True, ("cuda",), "on GPUs only")
    monkeypatch.setitem(sys.modules["cjepa_kernels.backends"]._statuses, "native", of_gpus)
    with pytest.raises(ValueError, match=r"loss\.backend: .*cuda, got tensors on cpu.*accelerator"):
        runner.train(tiny("loss.backend=native"), tmp_path / "run", progress_bar=False)
    assert not (tmp_path / "run").exists()


def test_failed_start_does_not_block_the_corrected_run(tmp_path: Path) -> None:
    config = tiny("trainer.epochs=1")
    with pytest.raises(ValueError, match=r"trainer\.precision"):
        runner.train(
            tiny("trainer.epochs=1", "trainer.precision=16-mixed"), tmp_path, progress_bar=False
        )
    assert runner.train(config, tmp_path, progress_bar=False).history[-1]["epoch"] == 1


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("checkpoints/last.ckpt", "remove it to start the run again"),
        ("config.yaml", "remove the directory"),
        ("result.json", "remove it to evaluate the run again"),
    ],
)
def test_damaged_file_of_a_run_is_named(name: str, remedy: str, tmp_path: Path) -> None:
    config = tiny("trainer.epochs=1")
    runner.train(config, tmp_path, progress_bar=False)
    if name != "result.json":
        (tmp_path / "result.json").unlink()
    # Half of a YAML file can still be valid YAML, so the half gets an invalid beginning as well.
    content = (tmp_path / name).read_bytes()
    for damaged in (b"", b"{[" + content[: len(content) // 2], b"\xff"):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"(?s){Path(name).name} is .*{remedy}"):
            runner.train(config, tmp_path, progress_bar=False)


def test_collapse_monitor_looks_at_every_class(tmp_path: Path) -> None:
    dataset = load_dataset(DataConfig())
    by_class = dataset.train.labels.argsort()
    history = MetricHistory(tmp_path / "metrics.csv", dataset, by_class)
    assert len(history.collapse_monitor.samples) == 512
    assert len(dataset.train.labels[history.collapse_monitor.samples].unique()) == 10
    repeated = MetricHistory(tmp_path / "metrics.csv", dataset, by_class)
    assert torch.equal(history.collapse_monitor.samples, repeated.collapse_monitor.samples)


def test_metrics_are_summed_without_fp64_on_mps(tmp_path: Path) -> None:
    class OnMps:
        device = torch.device("mps")

        def double(self) -> torch.Tensor:
            raise TypeError("MPS has no float64")

        def cpu(self) -> torch.Tensor:
            return torch.ones(2)

    history = MetricHistory(tmp_path / "metrics.csv", load_dataset(tiny().data), torch.arange(4))
    for step in range(2):
        history.on_train_batch_end(
            trainer=None,  # type: ignore[arg-type]
            pl_module=None,  # type: ignore[arg-type]
            outputs={"metrics": OnMps()},
            batch=None,
            batch_idx=step,
        )
    assert history._sums is not None
    assert history._sums.tolist() == [2.0, 2.0]


def test_resumed_run_purges_later_tensorboard_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    purged: list[int] = []

    class Recording(runner.TensorBoardLogger):
        def __init__(self, *args: Any, purge_step: int, **options: Any) -> None:
            purged.append(purge_step)
            super().__init__(*args, purge_step=purge_step, **options)

    monkeypatch.setattr(runner, "TensorBoardLogger", Recording)
    config = tiny("trainer.epochs=1", "logging.tensorboard=true")
    runner.train(config, tmp_path, progress_bar=False)
    (tmp_path / "result.json").unlink()
    runner.train(config, tmp_path, progress_bar=False)
    # The checkpoint holds four steps, so the resumed run purges from the fifth step on.
    assert purged == [1, 5]


def test_divergence_is_reported(tmp_path: Path) -> None:
    config = tiny("optimizer.learning_rate=1e3", "optimizer.gradient_clip=null")
    with pytest.raises(DivergenceError, match=r"optimizer\.learning_rate"):
        runner.train(config, tmp_path, progress_bar=False)
    assert not (tmp_path / "result.json").exists()


def test_encoder_of_a_checkpoint_is_the_evaluated_one(tmp_path: Path) -> None:
    config = tiny("data.pretrain_classes=half", "trainer.keep_every_n_epochs=1")
    result = runner.train(config, tmp_path, progress_bar=False)
    assert (tmp_path / "checkpoints" / "epoch0001.ckpt").is_file()
    assert "mean/transfer_knn" in result.evaluation
    extract, loaded = runner.load_encoder(tmp_path)
    assert loaded == config
    dataset = load_dataset(config.data)
    cls, mean = extract(dataset.test.images)
    assert cls.shape == mean.shape == (60, 16)
    numbers = runner.evaluate(extract, dataset, config.evaluation, pretrain_classes=range(5))
    assert numbers == result.evaluation
    untrained_cls, _ = runner.untrained_encoder(config)(dataset.test.images)
    assert not torch.allclose(untrained_cls, cls, atol=1e-2)
    with pytest.raises(ValueError, match=r"images.*\(1, 8, 8\).*\(3, 8, 8\)"):
        extract(dataset.test.images.expand(-1, 3, -1, -1))


def test_encoder_takes_the_pixels_that_are_stored_and_nothing_else(tmp_path: Path) -> None:
    config = tiny("trainer.epochs=1")
    runner.train(config, tmp_path, progress_bar=False)
    extract, _ = runner.load_encoder(tmp_path)
    images = load_dataset(config.data).test.images[:8]
    cls, mean = extract(images)

    encoder = VisionTransformer(config.model, (1, 8, 8), torch.zeros(1), torch.ones(1)).eval()
    prefix = "target_encoder."
    encoder.load_state_dict(
        {k.removeprefix(prefix): v for k, v in weights(tmp_path).items() if k.startswith(prefix)}
    )
    with torch.no_grad():
        tokens = encoder(images.float() / 255)
    assert torch.equal(cls, tokens[:, 0])
    assert torch.equal(mean, tokens[:, 1:].mean(dim=1))

    wrong = [images.float() / 255, images.float(), images.half(), images.long(), images > 0]
    for pixels in (*wrong, images.numpy()):
        with pytest.raises(TypeError, match=rf"^images: expected a uint8 .*got .*{pixels.dtype}"):
            extract(pixels)  # type: ignore[arg-type]
    # The message of the error recommends this conversion.
    converted = (255 * (images.float() / 255)).round().to(torch.uint8)
    assert torch.equal(extract(converted)[0], cls)
    with pytest.raises(ValueError, match=r"images.*\(1, 8, 8\).*\(8, 8\)"):
        extract(images[0])
    with pytest.raises(TypeError, match="expected a uint8 tensor"):
        runner.untrained_encoder(config)(images.float() / 255)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"], ids=["empty", "text"])
def test_file_that_is_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "some.ckpt"
    with pytest.raises(FileNotFoundError, match=r"some\.ckpt"):
        runner.load_encoder(file)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"some\.ckpt .*is not a checkpoint"):
        runner.load_encoder(file)


def test_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    storage = AtomicCheckpointIO()
    storage.save_checkpoint({"step": 1}, file)
    with pytest.raises(Exception, match="pickle"):
        storage.save_checkpoint({"step": (lambda: 2)}, file)
    assert storage.load_checkpoint(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_arms_share_initial_weights_and_the_baseline_ignores_the_contrastive_term(
    tmp_path: Path,
) -> None:
    jepa_alone = ("trainer.epochs=1", "loss.contrastive_weight=0")
    default = runner.train(tiny(*jepa_alone), tmp_path / "a", progress_bar=False)
    high_temperature = runner.train(
        tiny(*jepa_alone, "loss.contrastive_temperature=1"),
        tmp_path / "b",
        progress_bar=False,
    )
    assert default.evaluation == high_temperature.evaluation
    for name, value in weights(tmp_path / "a").items():
        assert torch.equal(value, weights(tmp_path / "b")[name]), name


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_out_each_batch(ranks: int) -> None:
    def batches(rank: int, count: int, epoch: int) -> list[list[int]]:
        sampler = EpochBatches(50, 16, seed=3, rank=rank, ranks=count)
        sampler.set_epoch(epoch)
        assert len(sampler) == 3
        return list(sampler)

    whole_batches = batches(0, 1, 5)
    assert len({index for batch in whole_batches for index in batch}) == 48
    for position, batch in enumerate(whole_batches):
        parts = [batches(rank, ranks, 5)[position] for rank in range(ranks)]
        assert sorted(index for part in parts for index in part) == sorted(batch)
    assert batches(0, 1, 6) != whole_batches


def test_csv_leaves_absent_metrics_empty() -> None:
    text = to_csv([{"epoch": 1.0, "loss": 0.1}, {"epoch": 2.0, "loss": 0.25, "eval/knn": 50.0}])
    assert text == "epoch,loss,eval/knn\n1,0.1,\n2,0.25,50.0\n"


def train_on_two_ranks(config: ExperimentConfig, directory: Path) -> RunResult:
    file = directory / "experiment.json"
    file.write_text(json.dumps(config_to_dict(config)))
    completed = subprocess.run(
        [*COMMAND, "--config", str(file), "--out", str(directory / "two")],
        env={**os.environ, "MASTER_ADDR": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return load_result(directory / "two")


def test_two_ranks_train_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    two_ranks = train_on_two_ranks(tiny("trainer.devices=2"), tmp_path)
    one_rank = runner.train(tiny(), tmp_path / "one", progress_bar=False)
    for row, expected in zip(two_ranks.history, one_rank.history, strict=True):
        assert row.keys() == expected.keys()
        for name, value in row.items():
            assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
    expected_weights = weights(tmp_path / "one")
    for name, weight in weights(tmp_path / "two").items():
        if name.endswith("query_key_value.bias"):
            # Softmax is invariant to the bias of the keys. The gradient of this bias is therefore
            # only rounding error, which AdamW scales up to steps of the usual size.
            keys = slice(len(weight) // 3, 2 * len(weight) // 3)
            weight[keys] = expected_weights[name][keys]
        torch.testing.assert_close(weight, expected_weights[name], rtol=1e-3, atol=1e-4)


def test_two_ranks_that_contrast_their_own_pairs(tmp_path: Path) -> None:
    # Without the JEPA term the predictor gets no gradient, and DDP must not wait for one.
    overrides = ("trainer.epochs=1", "loss.jepa_weight=0", "loss.gather_distributed=false")
    result = train_on_two_ranks(tiny("trainer.devices=2", *overrides), tmp_path)
    assert result.history[0]["step"] == 4
    assert result.evaluation["mean/linear"] > 0
    # Each rank contrasts its own 16 pairs, for which the loss at chance is log(31). With all 32
    # pairs in one process the loss would start above log(63).
    assert math.log(31) < result.history[0]["contrastive_loss"] < math.log(63)
