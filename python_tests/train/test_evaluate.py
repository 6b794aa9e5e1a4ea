"""Compare probes, collapse measures and corruptions with independent computations."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("sklearn")
pytest.importorskip("pydantic")

from cjepa_kernels.train.config import DataConfig, EvaluationConfig
from cjepa_kernels.train.data.dataset import Dataset, LabeledImages, load_dataset
from cjepa_kernels.train.evaluation import corruptions
from cjepa_kernels.train.evaluation.collapse_measures import effective_rank, standard_deviation
from cjepa_kernels.train.evaluation.features import FeatureExtractor
from cjepa_kernels.train.evaluation.probes import (
    evaluate,
    evaluate_pixels,
    few_label_draws,
    probe_sizes,
)

FAST = EvaluationConfig(few_label_draws=2, robustness=False)


def blobs(per_class: int = 30, classes: int = 4, spread: float = 12.0, seed: int = 0) -> Dataset:
    """Make images that are one random pattern per class with noise added."""
    random = np.random.RandomState(seed)
    patterns = random.uniform(60, 190, size=(classes, 1, 6, 6))

    def split(count: int) -> LabeledImages:
        labels = np.arange(classes).repeat(count)
        pixels = patterns[labels] + spread * random.standard_normal((len(labels), 1, 6, 6))
        return LabeledImages(
            torch.from_numpy(pixels.clip(0, 255)).to(torch.uint8), torch.from_numpy(labels)
        )

    return Dataset(
        "blobs", split(per_class), split(10), tuple(f"class {i}" for i in range(classes))
    )


def flat(images: Tensor) -> tuple[Tensor, Tensor]:
    pixels = images.flatten(1).float()
    return pixels.sqrt(), pixels


def constant(images: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones(len(images), 5), torch.ones(len(images), 5)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(DataConfig())


@pytest.fixture(scope="module")
def pixel_scores(digits: Dataset) -> dict[str, float]:
    return evaluate_pixels(digits, EvaluationConfig(), pretrain_classes=range(5))


@pytest.mark.parametrize(
    ("metric", "expected"),
    # These accuracies were measured without this package: the same probes were fitted to the pixels
    # of scikit-learn's digits.
    [("linear", 96.9), ("knn", 97.3), ("few_label", 88.7)],
)
def test_pixels_of_digits(pixel_scores: dict[str, float], metric: str, expected: float) -> None:
    assert pixel_scores[f"pixels/{metric}"] == pytest.approx(expected, abs=0.06)


def test_evaluation_is_deterministic_and_complete(
    digits: Dataset, pixel_scores: dict[str, float]
) -> None:
    repeated = evaluate_pixels(digits, EvaluationConfig(), pretrain_classes=range(5))
    assert repeated == pixel_scores
    metrics = {"linear", "few_label", "knn", "std", "effective_rank", "linear_robust"}
    metrics |= {f"linear_{k}_{s}" for k in ("noise", "blur", "shift") for s in (1, 2, 3)}
    metrics |= {"transfer_linear", "transfer_few_label", "transfer_knn"}
    assert set(pixel_scores) == {f"pixels/{metric}" for metric in metrics}


def test_robust_is_the_mean_of_nine(pixel_scores: dict[str, float]) -> None:
    corrupted = [v for k, v in pixel_scores.items() if k[-2:] in ("_1", "_2", "_3")]
    assert len(corrupted) == 9
    assert pixel_scores["pixels/linear_robust"] == pytest.approx(sum(corrupted) / 9)
    # A stronger corruption lowers the accuracy.
    for kind in corruptions.KINDS:
        weak, strong = (pixel_scores[f"pixels/linear_{kind}_{s}"] for s in (1, 3))
        assert strong < weak - 10


def test_knn_equals_a_direct_computation() -> None:
    data = blobs(spread=60.0)
    result = evaluate(flat, data, FAST)
    train, test = (s.images.flatten(1).double() for s in (data.train, data.test))
    a, b = (torch.nn.functional.normalize(x - train.mean(0), dim=1) for x in (train, test))
    nearest = (b @ a.T).topk(FAST.knn_k, dim=1).indices
    votes = torch.nn.functional.one_hot(data.train.labels[nearest], 4).sum(1)
    expected = 100 * (votes.argmax(1) == data.test.labels).double().mean().item()
    # The accuracy is above chance, 25 %, and below 100 %.
    assert 30 < expected < 100
    assert result["mean/knn"] == pytest.approx(expected)


def test_cls_and_mean_are_not_swapped() -> None:
    data = blobs()

    def half_blind(images: Tensor) -> tuple[Tensor, Tensor]:
        return flat(images)[1], torch.ones(len(images), 7)

    result = evaluate(half_blind, data, FAST)
    assert result["cls/linear"] == 100
    assert result["mean/linear"] == pytest.approx(25)


def test_linear_probe_ignores_the_scale_of_a_feature() -> None:
    data = blobs(spread=60.0)
    scale = torch.logspace(-3, 3, 36)

    def scaled(images: Tensor) -> tuple[Tensor, Tensor]:
        return flat(images)[1] * scale, flat(images)[1]

    result = evaluate(scaled, data, FAST)
    assert result["cls/linear"] == pytest.approx(result["mean/linear"], abs=2.6)


def test_probe_l2_is_used() -> None:
    data = blobs(spread=150.0)
    strong = evaluate(flat, data, FAST.model_copy(update={"probe_l2": 1e-7}))
    assert strong["mean/linear"] != evaluate(flat, data, FAST)["mean/linear"]


def test_quick_is_a_part_of_the_full_evaluation() -> None:
    data = blobs()
    config = EvaluationConfig(few_label_draws=3)
    quick, full = evaluate(flat, data, config, quick=True), evaluate(flat, data, config)
    metrics = ("few_label", "knn", "std", "effective_rank")
    assert set(quick) == {f"{f}/{m}" for f in ("mean", "cls") for m in metrics}
    assert quick == {key: full[key] for key in quick}


def test_transfer_uses_the_other_classes_alone() -> None:
    data = blobs()

    def only_first_two(images: Tensor) -> tuple[Tensor, Tensor]:
        # Classes 0 and 1 have a feature vector each; classes 2 and 3 share one.
        centres = [data.train.images[data.train.labels == c].float().mean(0) for c in range(4)]
        distances = torch.stack([(images.float() - c).flatten(1).norm(dim=1) for c in centres], 1)
        nearest = distances.argmin(1)
        code = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]])[nearest]
        return code, code

    result = evaluate(only_first_two, data, FAST, pretrain_classes=[0, 1])
    assert result["mean/transfer_linear"] == pytest.approx(50)
    assert result["mean/linear"] == pytest.approx(75)
    other_half = evaluate(only_first_two, data, FAST, pretrain_classes=[2, 3])
    assert other_half["mean/transfer_linear"] == 100


def test_few_label_draws_are_fixed_and_balanced() -> None:
    labels = np.array([0] * 5 + [1] * 50 + [2] * 50)
    draws = few_label_draws(labels, 10, 4)
    for draw, repeated_draw in zip(draws, few_label_draws(labels, 10, 4), strict=True):
        assert (draw == repeated_draw).all()
        assert np.bincount(labels[draw]).tolist() == [5, 10, 10]
        assert len(set(draw.tolist())) == 25
    assert not (np.sort(draws[0]) == np.sort(draws[1])).all()


def test_max_train_images_limits_the_probe() -> None:
    data = blobs()
    counts: list[int] = []

    def counting(images: Tensor) -> tuple[Tensor, Tensor]:
        counts.append(len(images))
        return flat(images)

    evaluate(counting, data, FAST.model_copy(update={"max_train_images": 50}))
    assert counts == [50, 40]


@pytest.mark.parametrize("dim", [8, 64])
def test_collapse_metrics_of_an_isotropic_cloud(dim: int) -> None:
    cloud = np.random.RandomState(0).standard_normal((20000, dim))
    assert standard_deviation(cloud) == pytest.approx(1, abs=0.02)
    assert effective_rank(cloud) == pytest.approx(dim, rel=0.02)


def test_collapse_metrics_of_collapsed_features() -> None:
    result = evaluate(constant, blobs(), FAST)
    assert result["mean/std"] == pytest.approx(0, abs=1e-12)
    assert result["mean/effective_rank"] == 0
    assert result["mean/linear"] == pytest.approx(25)


def test_effective_rank_of_known_singular_values() -> None:
    random = np.random.RandomState(0)
    raw = random.standard_normal((50, 3))
    # The columns of u have mean 0, so centring the features removes only their offset.
    u = np.linalg.qr(raw - raw.mean(0))[0]
    v = np.linalg.qr(random.standard_normal((7, 7)))[0][:3]
    p = np.array([0.6, 0.3, 0.1])
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert effective_rank(u @ np.diag(10 * p) @ v + 5.0) == pytest.approx(expected)


@pytest.mark.parametrize("kind", corruptions.KINDS)
@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (3, 3, 12, 20)], ids=["gray", "colour"])
def test_corruptions_keep_the_format(kind: str, shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    images = images.to(torch.uint8)
    before = images.clone()
    changes = []
    for strength in corruptions.STRENGTHS:
        out = corruptions.corrupt(images, kind, strength)
        assert out.shape == images.shape
        assert out.dtype == torch.uint8
        assert torch.equal(out, corruptions.corrupt(images, kind, strength))
        changes.append((out.float() - images.float()).abs().mean().item())
    assert torch.equal(images, before)
    assert 0 < changes[0] < changes[2]


def test_noise_has_the_documented_strength() -> None:
    gray = torch.full((4, 1, 64, 64), 128, dtype=torch.uint8)
    # Strength 3 is left out, because clipping to 0..255 lowers its standard deviation.
    for strength, fraction in zip((1, 2), (0.1, 0.2), strict=True):
        noise = corruptions.corrupt(gray, "noise", strength).float() - 128
        assert noise.std().item() == pytest.approx(255 * fraction, rel=0.03)


def test_blur_keeps_the_mean_and_equals_scipy() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    image = torch.zeros(1, 1, 33, 33, dtype=torch.uint8)
    image[0, 0, 16, 16] = 255
    image[0, 0, 10:14, 20:30] = 200
    std = corruptions.BLUR_STD[1] * 33
    radius = math.ceil(3 * std)
    expected = ndimage.gaussian_filter(
        image[0, 0].double().numpy(), std, mode="nearest", radius=radius
    )
    blurred = corruptions.corrupt(image, "blur", 2)[0, 0].numpy()
    np.testing.assert_allclose(blurred, expected, atol=0.51)


def test_shift_moves_by_the_documented_distance() -> None:
    images = torch.zeros(40, 1, 16, 16, dtype=torch.uint8)
    images[:, :, 8, 8] = 255
    # Strength 2 shifts by 12.5 % of 16 pixels, that is by 2 pixels.
    moved = corruptions.corrupt(images, "shift", 2)
    positions = {tuple(position) for position in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert positions == {(8, 10), (8, 6), (10, 8), (6, 8)}


def edit(split: LabeledImages, **changes: Tensor) -> LabeledImages:
    return LabeledImages(**{"images": split.images, "labels": split.labels, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: edit(d, images=d.images.float()), "uint8"),
        (lambda d: edit(d, images=d.images[:, 0]), r"\(N, C, H, W\)"),
        (lambda d: edit(d, labels=d.labels[:-1]), "one label per image"),
        (lambda d: edit(d, images=d.images[:0], labels=d.labels[:0]), "at least one image"),
        (lambda d: edit(d, labels=torch.zeros_like(d.labels)), "at least 2 classes"),
    ],
    ids=["float", "no-channel", "labels-short", "empty", "one-class"],
)
def test_malformed_datasets(change: Callable[[LabeledImages], LabeledImages], message: str) -> None:
    data = blobs()
    broken = Dataset(data.name, change(data.train), data.test, data.class_names)
    with pytest.raises(ValueError, match=message):
        evaluate(flat, broken, FAST)


@pytest.mark.parametrize(
    ("extract", "message"),
    [
        (lambda x: (torch.zeros(len(x)), torch.zeros(len(x), 2)), r"CLS features of shape"),
        (lambda x: (torch.zeros(len(x), 2), torch.zeros(1, 2)), r"mean of patch features"),
        (lambda x: (torch.full((len(x), 2), math.nan), torch.zeros(len(x), 2)), "not finite"),
    ],
    ids=["1-D", "too-few", "nan"],
)
def test_malformed_features(extract: FeatureExtractor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(extract, blobs(), FAST)


def test_transfer_needs_two_classes() -> None:
    with pytest.raises(ValueError, match=r"leave at least 2 classes.*got \[0, 1, 2\]"):
        evaluate(flat, blobs(), FAST, pretrain_classes=[0, 1, 2])


def test_too_few_training_images() -> None:
    with pytest.raises(ValueError, match=r"max_train_images.*got 1"):
        evaluate(flat, blobs(), FAST.model_copy(update={"max_train_images": 1}))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(1, 1, 4, 4), "noise", 1), TypeError, "uint8"),
        ((torch.zeros(1, 4, 4, dtype=torch.uint8), "noise", 1), ValueError, r"got \(1, 4, 4\)"),
        ((torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "fog", 1), ValueError, "got 'fog'"),
        ((torch.zeros(1, 1, 4, 4, dtype=torch.uint8), "noise", 4), ValueError, "got 4"),
    ],
    ids=["dtype", "shape", "kind", "strength"],
)
def test_corrupt_rejects(
    arguments: tuple[Tensor, str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        corruptions.corrupt(*arguments)


def test_sizes_of_the_probes_are_those_that_the_probes_use() -> None:
    """A class with only eight images gives eight labels, although ten are requested."""
    uneven = torch.tensor([0] * 8 + [1] * 12 + [2] * 9)
    dataset = Dataset(
        "uneven",
        LabeledImages(torch.zeros(29, 1, 4, 4, dtype=torch.uint8), uneven),
        LabeledImages(torch.zeros(5, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 0, 1, 1, 2])),
        ("a", "b", "c"),
    )
    config = EvaluationConfig(few_labels=10, few_label_draws=3, knn_k=40)
    sizes = probe_sizes(dataset, config)
    draws = few_label_draws(uneven.numpy(), config.few_labels, config.few_label_draws)
    used = {int(n) for draw in draws for n in np.bincount(uneven.numpy()[draw])}
    assert (sizes.fewest_labels, sizes.most_labels) == (min(used), max(used)) == (8, 10)
    assert (sizes.train_images, sizes.test_images, sizes.neighbours) == (29, 5, 29)
    assert sizes.draws == len(draws)
    transfer = probe_sizes(dataset, config, [1])
    assert (transfer.train_images, transfer.test_images) == (17, 3)
    assert (transfer.fewest_labels, transfer.most_labels, transfer.neighbours) == (8, 9, 17)
    limited = probe_sizes(dataset, config.model_copy(update={"max_train_images": 6}))
    assert limited.train_images == 6
    assert limited.most_labels < 8
