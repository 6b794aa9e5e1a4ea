"""Test the encoder, the predictor, the schedules and the training step."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("lightning")

from cjepa_kernels.train.config import ExperimentConfig, ModelConfig, config_from_dict
from cjepa_kernels.train.loop.module import CJEPAModule, MaskedViews, feature_extractor
from cjepa_kernels.train.model.vit import (
    Predictor,
    TransformerBlock,
    VisionTransformer,
    patchify,
    pool_tokens,
    sine_cosine_positions,
    take_tokens,
)

CONFIG = ModelConfig(
    patch_size=2, dim=16, depth=2, heads=2, predictor_dim=8, predictor_heads=2, predictor_depth=2
)
SHAPE = (3, 6, 8)


@pytest.fixture
def encoder() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(CONFIG, SHAPE, torch.tensor([0.1, 0.2, 0.3]), torch.full((3,), 0.5))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(1))


def test_patches_match_unfold(images: torch.Tensor) -> None:
    expected = torch.nn.functional.unfold(images, 2, stride=2).transpose(1, 2)
    assert torch.equal(patchify(images, 2), expected)


def test_visible_patches_alone_decide(encoder: VisionTransformer, images: torch.Tensor) -> None:
    visible = torch.tensor([[0, 5, 7]]).expand(5, -1)
    features = encoder(images, visible)
    assert features.shape == (5, 4, 16)
    changed = images.clone()
    # Patch 1 is hidden, so its pixels have no effect.
    changed[:, :, :2, 2:4] = 0.0
    assert torch.equal(encoder(changed, visible), features)
    # Patch 5 is visible, so its pixels have an effect.
    changed[:, :, 2:4, 2:4] = 0.0
    assert not torch.allclose(encoder(changed, visible), features)
    all_patches = torch.arange(12).expand(5, -1)
    torch.testing.assert_close(encoder(images, all_patches), encoder(images))


def test_wanted_patches_equal_those_of_the_full_output(
    encoder: VisionTransformer, images: torch.Tensor
) -> None:
    wanted = torch.tensor([[0, 3], [11, 2], [5, 5], [1, 0], [7, 9]])
    expected = take_tokens(encoder(images)[:, 1:], wanted)
    torch.testing.assert_close(encoder(images, wanted=wanted), expected)


def test_block_matches_multihead_attention() -> None:
    torch.manual_seed(0)
    block = TransformerBlock(16, 4, 2.0)
    reference = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(block.query_key_value.weight)
        reference.in_proj_bias.copy_(block.query_key_value.bias)
        reference.out_proj.weight.copy_(block.attention_output.weight)
        reference.out_proj.bias.copy_(block.attention_output.bias)
    tokens = torch.randn(3, 7, 16)
    normed = block.attention_norm(tokens)
    middle = tokens + reference(normed, normed, normed)[0]
    hidden = torch.nn.functional.gelu(block.mlp_input(block.mlp_norm(middle)))
    torch.testing.assert_close(block(tokens), middle + block.mlp_output(hidden))


def test_normalisation_is_part_of_the_encoder(
    encoder: VisionTransformer, images: torch.Tensor
) -> None:
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), 0.5
    plain = VisionTransformer(CONFIG, SHAPE, torch.zeros(3), torch.ones(3))
    plain.load_state_dict(
        {**encoder.state_dict(), **{k: v for k, v in plain.state_dict().items() if "channel" in k}}
    )
    torch.testing.assert_close(plain((images - mean) / std), encoder(images))


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 1)])
def test_positions_are_centred_and_distinct(grid: tuple[int, int]) -> None:
    table = sine_cosine_positions(grid, 32, 0.5)
    assert table.shape == (grid[0] * grid[1], 32)
    torch.testing.assert_close(table.mean(0), torch.zeros(32), atol=1e-6, rtol=0)
    if len(table) > 1:
        assert table.std().item() == pytest.approx(0.5)
        assert torch.pdist(table).min() > 0.1


@pytest.mark.parametrize("level", [0, 1, 2])
def test_levels_average_runs_of_tokens(level: int) -> None:
    tokens = torch.randn(2, 6, 3)
    run = 2**level
    expected = torch.nn.functional.avg_pool1d(tokens.transpose(1, 2), run).transpose(1, 2)
    torch.testing.assert_close(pool_tokens(tokens, level), expected)


def test_predictor_ignores_cls_and_knows_where_it_predicts() -> None:
    torch.manual_seed(0)
    predictor = Predictor(CONFIG, (3, 4), levels=3)
    context = torch.randn(2, 4, 16)
    visible = torch.tensor([[0, 1, 2], [3, 4, 5]])
    predicted = torch.tensor([[6, 7, 8, 9], [6, 7, 8, 9]])
    out = predictor(context, visible, predicted)
    assert [tuple(level.shape) for level in out] == [(2, 4, 16), (2, 2, 16), (2, 1, 16)]
    changed = context.clone()
    changed[:, 0] += 1.0
    assert torch.equal(predictor(changed, visible, predicted)[0], out[0])
    swapped = predictor(context, visible, predicted.flip(1))[0]
    torch.testing.assert_close(swapped.flip(1), out[0])
    moved = predictor(context, visible.flip(0), predicted)[0]
    assert not torch.allclose(moved, out[0])


def module(*overrides: str) -> CJEPAModule:
    config: ExperimentConfig = config_from_dict({}, ["model.dim=16", "model.heads=2", *overrides])
    return CJEPAModule(
        config,
        (1, 8, 8),
        channel_mean=torch.tensor([0.3]),
        channel_std=torch.tensor([0.4]),
        total_steps=100,
    )


def batch(pairs: int = 8) -> MaskedViews:
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(2 * pairs, 16, generator=generator).argsort(1)
    return MaskedViews(
        torch.rand(2 * pairs, 1, 8, 8, generator=generator),
        order[:, :10].sort(1).values,
        order[:, 12:].sort(1).values,
    )


@pytest.mark.parametrize(
    ("override", "encoder_cls", "predictor"),
    [
        pytest.param("loss.contrastive_weight=0.1", True, True, id="cjepa"),
        pytest.param("loss.contrastive_weight=0", False, True, id="jepa"),
        pytest.param("loss.jepa_weight=0", True, False, id="contrastive"),
    ],
)
def test_gradients_reach_what_each_arm_trains(
    override: str, encoder_cls: bool, predictor: bool
) -> None:
    model = module(override)
    out = model.training_step(batch(), 0)
    out["loss"].backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert all((p.grad is not None) == predictor for p in model.predictor.parameters())
    assert all(p.grad is None for p in model.target_encoder.parameters())
    metrics = dict(zip(model.metric_names, out["metrics"].tolist(), strict=True))
    assert all(math.isfinite(value) for value in metrics.values())
    expected = (
        model.loss.jepa_weight * metrics["jepa_loss"]
        + model.loss.contrastive_weight * metrics["contrastive_loss"]
    )
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert out["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_step_matches_its_definition() -> None:
    model, views = module(), batch()
    metrics = dict(
        zip(model.metric_names, model.training_step(views, 0)["metrics"].tolist(), strict=True)
    )
    context = model.encoder(views.images, views.visible)
    full = model.target_encoder(views.images)[:, 1:]
    levels = model.predictor(context, views.visible, views.predicted)
    total = 0.0
    for level, (prediction, weight) in enumerate(zip(levels, (1.0, 0.5, 0.25), strict=True)):
        target = pool_tokens(take_tokens(full, views.predicted), level)
        target = torch.nn.functional.layer_norm(target, target.shape[-1:])
        total += weight * torch.nn.functional.smooth_l1_loss(prediction, target).item()
    assert metrics["jepa_loss"] == pytest.approx(total, rel=1e-5)
    z = torch.nn.functional.normalize(context[:, 0], dim=1).double()
    logits = (z @ z.T / 0.1).fill_diagonal_(-math.inf)
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(16).roll(8)).item()
    assert metrics["contrastive_loss"] == pytest.approx(expected, rel=1e-5)


def test_schedules() -> None:
    model = module("optimizer.warmup_fraction=0.1", "optimizer.ema_start=0.9")
    rates = [model.learning_rate_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(2e-4)
    assert max(rates) == pytest.approx(rates[9]) == pytest.approx(2e-3)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx((2e-3 + 1e-5) / 2, rel=1e-6)
    assert 1e-5 < rates[99] < 2e-5
    assert model.momentum_at(0) == 0.9
    assert model.momentum_at(50) == pytest.approx(0.95)


def test_vectors_and_tokens_do_not_decay() -> None:
    model = module()
    optimizer = model.configure_optimizers()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, not_decayed = (
        {names[id(p)] for p in group["params"]} for group in optimizer.param_groups
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    assert {"encoder.cls_token", "predictor.mask_token", "encoder.norm.weight"} <= not_decayed
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert not any(name.startswith("target_encoder") for name in decayed | not_decayed)


def test_same_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second, other = module(), module(), module("seed=1")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.encoder.embedding.weight, second.encoder.embedding.weight)
    assert not torch.equal(first.encoder.embedding.weight, other.encoder.embedding.weight)


def test_features_are_batched_and_restore_the_mode(encoder: VisionTransformer) -> None:
    images = torch.randint(0, 256, (7, *SHAPE), dtype=torch.uint8)
    cls, mean = feature_extractor(encoder.train(), "cpu", batch_size=3)(images)
    tokens = encoder(images.float() / 255)
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(mean, tokens[:, 1:].mean(1))
    assert not cls.requires_grad
    assert encoder.training
