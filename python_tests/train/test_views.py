"""Test the counter-based random numbers and the views that are drawn with them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pydantic")

from cjepa_kernels.train.config import ViewsConfig
from cjepa_kernels.train.data.randomness import normal, permutation, stream_key, uniform
from cjepa_kernels.train.data.views import one_view, two_views

NO_AUGMENTATION = ViewsConfig(rotation=0, scale=(1, 1), shift=0, brightness=0, noise=0)
COLOUR = ViewsConfig(
    crop_area=(0.3, 1), flip=0.5, contrast=0.4, saturation=0.4, grayscale=0.2, noise=0.1
)
WORD = (1 << 64) - 1


def splitmix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def images(count: int, channels: int = 1, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_numbers_match_arbitrary_precision_integers() -> None:
    key, golden = stream_key(5, 1, 2), 0x9E3779B97F4A7C15
    drawn = uniform(key, torch.tensor([0, 3, 2**40]), 4)
    for row, sample in enumerate([0, 3, 2**40]):
        state = splitmix((sample * golden + key) & WORD)
        for position in range(4):
            bits = splitmix((state + (position + 1) * golden) & WORD)
            assert drawn[row, position].item() == (bits >> 40) / 2**24


def test_uniform_and_normal_have_their_moments() -> None:
    samples = torch.arange(2000)
    u = uniform(stream_key(0, 7), samples, 100).double()
    assert u.min() >= 0
    assert u.max() < 1
    # Each tolerance is five standard errors of its statistic. There are 200,000 numbers, and the
    # square root of 200,000 is 447.
    assert abs(u.mean() - 0.5) < 5 * 0.2887 / 447
    assert abs(u.var() - 1 / 12) < 5 * 0.0745 / 447
    counts = torch.histc(u, 64, 0, 1)
    chi_square = ((counts - len(u) * 100 / 64) ** 2 / (len(u) * 100 / 64)).sum()
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5
    z = normal(stream_key(0, 8), samples, 100).double()
    assert abs(z.mean()) < 5 / 447
    assert abs(z.var() - 1) < 5 * 1.4142 / 447
    assert abs((z**4).mean() - 3) < 5 * 9.8 / 447


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(stream_key(1, 1, 1), id="seed"),
        pytest.param(stream_key(0, 2, 1), id="stream"),
        pytest.param(stream_key(0, 1, 2), id="epoch"),
    ],
)
def test_streams_are_uncorrelated(other: int) -> None:
    samples = torch.arange(500)
    pair = torch.stack(
        [uniform(key, samples, 100).flatten() for key in (stream_key(0, 1, 1), other)]
    )
    assert abs(torch.corrcoef(pair)[0, 1]) < 5 / 50000**0.5


def test_neighbouring_samples_and_positions_are_uncorrelated() -> None:
    u = uniform(stream_key(0), torch.arange(501), 101)
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 / a.numel() ** 0.5


@pytest.mark.parametrize("count", [1, 2, 1347])
def test_permutation_holds_every_index_once(count: int) -> None:
    order = permutation(stream_key(0, 0, 3), count)
    assert order.sort().values.tolist() == list(range(count))
    if count > 2:
        assert order.tolist() != permutation(stream_key(0, 0, 4), count).tolist()


@pytest.mark.parametrize(("config", "channels"), [(ViewsConfig(), 1), (COLOUR, 3)])
def test_view_depends_on_its_sample_alone(config: ViewsConfig, channels: int) -> None:
    batch, samples = images(9, channels), torch.arange(100, 109)
    whole = two_views(batch, samples, config, seed=1, epoch=2).view(2, 9, channels, 8, 8)
    order = torch.tensor([4, 0, 7])
    part = two_views(batch[order], samples[order], config, seed=1, epoch=2)
    assert torch.equal(part.view(2, 3, channels, 8, 8), whole[:, order])
    assert whole.min() >= 0
    assert whole.max() <= 1


def test_views_epochs_seeds_and_samples_differ() -> None:
    batch = images(1).expand(2, -1, -1, -1)
    first = two_views(batch, torch.tensor([0, 1]), ViewsConfig(), seed=0, epoch=0)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    for seed, epoch in ((1, 0), (0, 1)):
        other = two_views(batch, torch.tensor([0, 1]), ViewsConfig(), seed=seed, epoch=epoch)
        assert not torch.equal(first, other)


def test_zero_strength_is_the_image() -> None:
    batch = images(4, 3)
    views = two_views(batch, torch.arange(4), NO_AUGMENTATION, seed=0, epoch=0)
    torch.testing.assert_close(views[:4], batch / 255.0, atol=1e-5, rtol=0)


def test_certain_flip_mirrors() -> None:
    batch = images(4)
    config = NO_AUGMENTATION.model_copy(update={"flip": 1.0})
    views = two_views(batch, torch.arange(4), config, seed=0, epoch=0)
    torch.testing.assert_close(views[4:], batch.flip(-1) / 255.0, atol=1e-5, rtol=0)


def test_rotation_keeps_shape_on_a_wide_image() -> None:
    wide = torch.zeros(1, 1, 9, 17)
    wide[..., 4, :] = 1.0
    config = NO_AUGMENTATION.model_copy(update={"rotation": 180.0})
    rotated = torch.stack(
        [
            one_view(wide, torch.tensor([sample]), config, seed=0, epoch=0, view=0)[0, 0]
            for sample in range(40)
        ]
    )
    # The rotation works in pixels, so a line through the centre keeps its width at every angle.
    assert (rotated[:, 4, 8] > 0.8).all()
    vertical = rotated.sum(1).amax(1) > 7
    assert vertical.any()


@pytest.mark.parametrize("kind", ["shift", "zoom"])
def test_geometry_stays_within_its_range(kind: str) -> None:
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    changes = {"shift": {"shift": 0.1}, "zoom": {"scale": (0.5, 0.5)}}[kind]
    config = NO_AUGMENTATION.model_copy(update=changes)
    samples = torch.arange(200)
    views = one_view(ramp.expand(200, -1, -1, -1), samples, config, seed=0, epoch=0, view=0)
    centre = views[:, 0, 32, 32]
    slope = (views[:, 0, 32, 40] - views[:, 0, 32, 24]) * 63 / 16
    if kind == "shift":
        assert centre.min() >= 0.5 - 0.12
        assert centre.max() <= 0.5 + 0.12
        assert centre.max() - centre.min() > 0.15
        torch.testing.assert_close(slope, torch.ones(200), atol=1e-3, rtol=0)
    else:
        torch.testing.assert_close(slope, torch.full((200,), 0.5), atol=1e-3, rtol=0)


def test_brightness_contrast_and_grey() -> None:
    batch = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.4 + 0.2
    samples = torch.arange(64)
    bright = one_view(
        batch,
        samples,
        NO_AUGMENTATION.model_copy(update={"brightness": 0.2}),
        seed=0,
        epoch=0,
        view=0,
    )
    ratio = (bright / batch).flatten(1)
    torch.testing.assert_close(ratio.std(1), torch.zeros(64), atol=1e-4, rtol=0)
    assert ratio.min() >= 0.799
    assert ratio.max() <= 1.201
    assert ratio.std() > 0.08
    flat = one_view(
        batch,
        samples,
        NO_AUGMENTATION.model_copy(update={"contrast": 0.5}),
        seed=0,
        epoch=0,
        view=0,
    )
    torch.testing.assert_close(flat.mean((1, 2, 3)), batch.mean((1, 2, 3)))
    grey = one_view(
        batch,
        samples,
        NO_AUGMENTATION.model_copy(update={"grayscale": 1.0}),
        seed=0,
        epoch=0,
        view=0,
    )
    torch.testing.assert_close(grey, batch.mean(1, keepdim=True).expand_as(batch))


def test_noise_has_its_deviation() -> None:
    batch = torch.full((50, 1, 16, 16), 0.5)
    noisy = one_view(
        batch,
        torch.arange(50),
        NO_AUGMENTATION.model_copy(update={"noise": 0.1}),
        seed=0,
        epoch=0,
        view=0,
    )
    assert noisy.std().item() == pytest.approx(0.1, rel=0.05)
