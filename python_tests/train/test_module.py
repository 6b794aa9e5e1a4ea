"""Compare the training step, its schedules and its history with formulas written out here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("lightning")

import lightning as L
import train_experiments
from lightning.pytorch.callbacks import Callback
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, METRIC, relative_error

from cjepa_kernels import nt_xent
from cjepa_kernels.train import runner
from cjepa_kernels.train.config import ExperimentConfig, ViewsConfig, config_from_dict
from cjepa_kernels.train.data.batches import IndexedImages
from cjepa_kernels.train.data.dataset import load_dataset
from cjepa_kernels.train.data.masking import multi_block_masks
from cjepa_kernels.train.data.views import two_views
from cjepa_kernels.train.loop.module import CJEPAModule, MaskedViews

HIERARCHY_WEIGHTS = (1.0, 0.6, 0.3)
TEMPERATURE = 0.2
RATE, LOWEST_RATE = 1e-2, 1e-4
MOMENTUM_START, MOMENTUM_END = 0.9, 0.98
# 70 images fill 4 batches of 16, so 2 epochs have 8 steps. The fraction 0.4 of them, rounded to
# 3 steps, is the warm-up.
STEPS_PER_EPOCH, TOTAL_STEPS, WARMUP_STEPS = 4, 8, 3

TINY = {
    "seed": 5,
    "data": {"source": "digits", "train_size": 70, "test_size": 40},
    "model": train_experiments.TINY["model"],
    "loss": {
        "type": "cjepa",
        "jepa_weight": 0.7,
        "contrastive_weight": 0.3,
        "contrastive_temperature": TEMPERATURE,
        "contrastive_on_context": True,
        "jepa_loss_type": "smoothl1",
        "hierarchy_weights": list(HIERARCHY_WEIGHTS),
        "num_hierarchies": 3,
        "target_norm": "layer",
    },
    "optimizer": {
        "learning_rate": RATE,
        "min_learning_rate": LOWEST_RATE,
        "warmup_fraction": 0.4,
        "weight_decay": 0.07,
        "ema_start": MOMENTUM_START,
        "ema_end": MOMENTUM_END,
    },
    "trainer": {"epochs": 2, "batch_size": 16, "threads": 1},
    "evaluation": {"few_labels": 2, "few_label_draws": 1, "knn_k": 3, "robustness": False},
    "logging": {"tensorboard": False, "progress_bar": False},
}


def tiny(*overrides: str) -> ExperimentConfig:
    return config_from_dict(TINY, overrides)


def build_module(*overrides: str) -> CJEPAModule:
    """Build a float64 module whose target encoder differs from its encoder."""
    mean, std = torch.tensor([0.3]), torch.tensor([0.4])
    module = CJEPAModule(
        tiny(*overrides), (1, 8, 8), channel_mean=mean, channel_std=std, total_steps=TOTAL_STEPS
    ).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.target_encoder.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    return module


def loaded_batch(count: int = 6) -> IndexedImages:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return IndexedImages(images, torch.arange(count) * 7 + 3)


def masked_views(module: CJEPAModule) -> MaskedViews:
    views = module.on_after_batch_transfer(loaded_batch(), 0)
    return views._replace(images=views.images.double())


def averages_of_runs(tokens: Tensor, length: int) -> Tensor:
    """Average each run of ``length`` neighbouring tokens."""
    return F.avg_pool1d(tokens.transpose(1, 2), length).transpose(1, 2)


def expected_terms(module: CJEPAModule, batch: MaskedViews) -> dict[str, Tensor]:
    """Compute the terms of one step's loss and their weighted sum by the formula."""
    pairs = len(batch.images) // 2
    context = module.encoder(batch.images, batch.visible)
    predictions = module.predictor(context, batch.visible, batch.predicted)
    with torch.no_grad():
        all_patches = module.target_encoder(batch.images)[:, 1:]  # (2B, N, D)
    hidden = torch.stack(
        [all_patches[row, predicted] for row, predicted in enumerate(batch.predicted)]
    )
    terms: dict[str, Tensor] = {}
    for level in range(3):
        pooled = averages_of_runs(hidden, 2**level)
        deviation = (pooled.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        target = (pooled - pooled.mean(-1, keepdim=True)) / deviation
        error = (predictions[level] - target).abs()
        terms[f"loss_h{level}"] = torch.where(error < 1, 0.5 * error * error, error - 0.5).mean()
    terms["jepa_loss"] = torch.stack(
        [weight * terms[f"loss_h{level}"] for level, weight in enumerate(HIERARCHY_WEIGHTS)]
    ).sum()
    contrastive = nt_xent(context[:pairs, 0], context[pairs:, 0], temperature=TEMPERATURE)
    terms["contrastive_loss"] = contrastive.loss
    terms["contrastive_accuracy"] = contrastive.accuracy
    terms["contrastive_pos_sim"] = contrastive.positive_similarity
    terms["contrastive_neg_sim"] = contrastive.negative_similarity
    terms["loss"] = (
        module.loss.jepa_weight * terms["jepa_loss"]
        + module.loss.contrastive_weight * terms["contrastive_loss"]
    )
    return terms


def expected_rate(step: int) -> float:
    if step < WARMUP_STEPS:
        return RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (TOTAL_STEPS - WARMUP_STEPS)
    return LOWEST_RATE + (RATE - LOWEST_RATE) * (1 + math.cos(math.pi * progress)) / 2


def expected_momentum(step: int) -> float:
    return MOMENTUM_START + (MOMENTUM_END - MOMENTUM_START) * step / TOTAL_STEPS


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@dataclass
class Recorder(Callback):
    """Record the learning rates, the loss and the parameters of every step."""

    rates: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    # Both lists hold the parameters at the start and after each step.
    encoders: list[dict[str, Tensor]] = field(default_factory=list)
    targets: list[dict[str, Tensor]] = field(default_factory=list)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.encoders.append(snapshot(pl_module.encoder))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        # The module updates its target encoder in on_train_batch_end, which Lightning calls only
        # after the callbacks' on_train_batch_end. The next step is the first to see the update.
        self.targets.append(snapshot(pl_module.target_encoder))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.encoders.append(snapshot(pl_module.encoder))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.targets.append(snapshot(pl_module.target_encoder))


@dataclass(frozen=True)
class RecordedRun:
    steps: Recorder
    history: list[dict[str, float]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """Train for two epochs and record every step."""
    recorder = Recorder()
    fit = L.Trainer.fit

    def recorded_fit(trainer: Any, *args: Any, **options: Any) -> None:
        trainer.callbacks.append(recorder)
        fit(trainer, *args, **options)

    run_dir: Path = tmp_path_factory.mktemp("module") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(L.Trainer, "fit", recorded_fit)
        result = runner.train(tiny(), run_dir, progress_bar=False)
    return RecordedRun(recorder, result.history)


def test_each_view_has_a_mask_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CJEPAModule, "current_epoch", 3)
    module, loaded = build_module(), loaded_batch()
    views = module.on_after_batch_transfer(loaded, 0)
    config = module.config
    for view in (0, 1):
        half = slice(view * 6, (view + 1) * 6)
        masks = multi_block_masks(loaded.samples, (4, 4), config.masking, 5, epoch=3, view=view)
        assert torch.equal(views.visible[half], masks.visible)
        assert torch.equal(views.predicted[half], masks.predicted)
    assert not torch.equal(views.visible[:6], views.visible[6:])
    assert not torch.equal(views.predicted[:6], views.predicted[6:])
    expected = two_views(loaded.images, loaded.samples, config.views, 5, epoch=3)
    assert torch.equal(views.images, expected)


def test_batch_changes_with_the_epoch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, loaded = build_module(), loaded_batch()

    def views_at(epoch: int) -> MaskedViews:
        monkeypatch.setattr(CJEPAModule, "current_epoch", epoch)
        return module.on_after_batch_transfer(loaded, 0)

    first, repeated, second = views_at(0), views_at(0), views_at(1)
    for name in ("images", "visible", "predicted"):
        before, same, after = (getattr(views, name) for views in (first, repeated, second))
        assert torch.equal(before, same), name
        assert not torch.equal(before, after), name


NO_AUGMENTATION = {
    "rotation": 0.0,
    "scale": (1.0, 1.0),
    "shift": 0.0,
    "brightness": 0.0,
    "noise": 0.0,
}


@pytest.mark.parametrize(
    "change",
    [
        {"rotation": 20.0},
        {"scale": (0.8, 1.2)},
        {"shift": 0.2},
        {"crop_area": (0.3, 0.9)},
        {"brightness": 0.5},
        {"contrast": 0.5},
        {"noise": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_augmentation_follows_epoch_and_view(change: dict[str, Any]) -> None:
    config = ViewsConfig(**{**NO_AUGMENTATION, **change})
    images, samples, _ = loaded_batch()
    first, repeated, second = (
        two_views(images, samples, config, seed=0, epoch=epoch) for epoch in (4, 4, 5)
    )
    assert torch.equal(first, repeated)
    for before, after in zip(first, second, strict=True):
        assert not torch.equal(before, after)
    for view, other_view in zip(first[:6], first[6:], strict=True):
        assert not torch.equal(view, other_view)


def test_step_matches_the_formula() -> None:
    module = build_module()
    batch = masked_views(module)
    step = module.training_step(batch, 0)
    expected = expected_terms(module, batch)
    assert relative_error(step["loss"], expected["loss"]) <= FLOOR_VALUE[torch.float64]
    assert set(module.metric_names) == set(expected)
    for name, value in zip(module.metric_names, step["metrics"], strict=True):
        # The step returns its metrics in fp32.
        assert abs(value.item() - expected[name].item()) <= METRIC[torch.float32] * max(
            1.0, abs(expected[name].item())
        ), name


@pytest.mark.parametrize(
    ("jepa", "contrastive"), [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0)], ids=["both", "jepa", "nt-xent"]
)
def test_gradients_match_the_formula(jepa: float, contrastive: float) -> None:
    module = build_module(f"loss.jepa_weight={jepa}", f"loss.contrastive_weight={contrastive}")
    batch = masked_views(module)
    module.training_step(batch, 0)["loss"].backward()
    actual_gradients = {name: value.grad for name, value in module.named_parameters()}
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(
        expected_terms(module, batch)["loss"], list(trained.values()), allow_unused=True
    )
    reached = set()
    for name, gradient in zip(trained, gradients, strict=True):
        actual = actual_gradients.pop(name)
        if gradient is None or not gradient.any():
            assert actual is None or not actual.any(), name
            continue
        reached.add(name.split(".")[0])
        assert actual is not None, name
        assert relative_error(actual, gradient) <= FLOOR_GRADIENT[torch.float64], name
    assert reached == ({"encoder", "predictor"} if jepa else {"encoder"})
    assert all(gradient is None for gradient in actual_gradients.values())


def test_contrastive_term_reaches_cls_of_both_views() -> None:
    module = build_module("loss.jepa_weight=0", "loss.contrastive_weight=1")
    outputs: list[Tensor] = []

    def record(_module: Any, _inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    module.encoder.register_forward_hook(record)
    module.training_step(masked_views(module), 0)["loss"].backward()
    (context,) = outputs
    assert context.grad is not None
    assert context.grad[:, 0].any(dim=1).all()
    assert not context.grad[:, 1:].any()


@pytest.mark.parametrize("jepa", [1.0, 0.0], ids=["jepa", "no-jepa"])
def test_weight_decay_is_for_matrices(jepa: float) -> None:
    module = build_module(f"loss.jepa_weight={jepa}")
    optimizer = module.configure_optimizers()
    names = {parameter: name for name, parameter in module.named_parameters()}
    decay = {
        names[parameter]: group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    trained = ("encoder.", "predictor.") if jepa else ("encoder.",)
    expected = {
        # Only the weights of linear layers have names that end in "weight" without "norm".
        name: 0.07 if name.endswith(".weight") and "norm" not in name else 0.0
        for name in names.values()
        if name.startswith(trained)
    }
    assert decay == expected
    tokens = {name for name in decay if name.endswith("_token")}
    assert tokens == {"encoder.cls_token", *(["predictor.mask_token"] if jepa else [])}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(expected)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}


@pytest.mark.parametrize("classes", ["null", "half"])
def test_channel_statistics_are_those_of_the_pretraining_images(
    classes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[CJEPAModule] = []

    def build(*arguments: Any, **options: Any) -> CJEPAModule:
        built.append(CJEPAModule(*arguments, **options))
        return built[-1]

    config = tiny(f"data.pretrain_classes={classes}")
    dataset = load_dataset(config.data)
    monkeypatch.setattr(runner, "CJEPAModule", build)
    runner.untrained_encoder(config, dataset)
    (module,) = built
    images = dataset.train.images.double() / 255
    if classes == "half":
        images = images[dataset.train.labels < 5]
    for encoder in (module.encoder, module.target_encoder):
        assert encoder.channel_mean.shape == encoder.channel_std.shape == (1, 1, 1, 1)
        floor = FLOOR_VALUE[torch.float32]
        assert relative_error(encoder.channel_mean.flatten(), images.mean().view(1)) <= floor
        deviation = images.std(correction=0).view(1)
        assert relative_error(encoder.channel_std.flatten(), deviation) <= floor
    assert module.total_steps == len(images) // 16 * 2


def test_rates_in_the_optimiser_follow_the_schedule(recorded: RecordedRun) -> None:
    expected = [expected_rate(step) for step in range(TOTAL_STEPS)]
    assert len(recorded.steps.rates) == TOTAL_STEPS
    for decayed, not_decayed in zip(*zip(*recorded.steps.rates, strict=True), strict=True):
        assert decayed == not_decayed
    actual = [rates[0] for rates in recorded.steps.rates]
    assert actual == pytest.approx(expected, rel=FLOOR_VALUE[torch.float64])
    last = [row["learning_rate"] for row in recorded.history]
    expected_last = [expected[STEPS_PER_EPOCH - 1], expected[-1]]
    assert last == pytest.approx(expected_last, rel=FLOOR_VALUE[torch.float64])


def test_target_encoder_is_the_moving_average(recorded: RecordedRun) -> None:
    steps = recorded.steps
    assert len(steps.encoders) == len(steps.targets) == TOTAL_STEPS + 1
    average = {name: value.double() for name, value in steps.encoders[0].items()}
    for name, value in average.items():
        assert torch.equal(steps.targets[0][name].double(), value), name
    for step in range(TOTAL_STEPS):
        momentum = expected_momentum(step)
        for name, value in steps.encoders[step + 1].items():
            average[name] = momentum * average[name] + (1 - momentum) * value.double()
            error = relative_error(steps.targets[step + 1][name], average[name])
            assert error <= FLOOR_VALUE[torch.float32], (step, name)
    last = [row["momentum"] for row in recorded.history]
    expected_last = [expected_momentum(STEPS_PER_EPOCH - 1), expected_momentum(TOTAL_STEPS - 1)]
    assert last == pytest.approx(expected_last, rel=FLOOR_VALUE[torch.float64])


def test_history_holds_the_means_of_its_epoch(recorded: RecordedRun) -> None:
    losses = recorded.steps.losses
    assert len(losses) == TOTAL_STEPS
    assert [row["step"] for row in recorded.history] == [STEPS_PER_EPOCH, TOTAL_STEPS]
    for epoch, row in enumerate(recorded.history):
        steps = losses[epoch * STEPS_PER_EPOCH : (epoch + 1) * STEPS_PER_EPOCH]
        mean = sum(steps) / STEPS_PER_EPOCH
        assert row["epoch"] == epoch + 1
        assert row["loss"] == pytest.approx(mean, rel=FLOOR_VALUE[torch.float64])
        jepa, contrastive = 0.7 * row["jepa_loss"], 0.3 * row["contrastive_loss"]
        assert jepa + contrastive == pytest.approx(mean, rel=FLOOR_VALUE[torch.float32])
        assert row["term_ratio"] == pytest.approx(
            contrastive / jepa, rel=FLOOR_VALUE[torch.float64]
        )
