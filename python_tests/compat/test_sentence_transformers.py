"""``compat.sentence_transformers`` has the losses of sentence-transformers."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import peer_losses
import pytest
import torch
import torch.distributed as dist
from peer_training import SOURCES, Model, assert_same_training, peer
from ranks import Ranks
from tolerances import FLOOR_GRADIENT, FLOOR_VALUE, relative_error
from torch import Tensor, nn

from cjepa_kernels.compat.sentence_transformers import MultipleNegativesRankingLoss, cos_sim

MODULE = "sentence_transformers.sentence_transformer.losses"
NAME = "MultipleNegativesRankingLoss"
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "symmetric": {
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
    },
    "gte": {"directions": ALL, "scale": 5.0},
}


class Embed(nn.Module):
    """A model that returns its input, as the embeddings of its column."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["rows"]}


def columns(rows: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"rows": column} for column in rows]


def triplets(loss_fn: nn.Module, model: Model, samples: Tensor, others: Tensor) -> Tensor:
    rows = [model.towers[0](samples), model.towers[1](others), model.towers[1](others.roll(1, 0))]
    loss: Tensor = loss_fn(columns(rows), None)
    return loss


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("source", SOURCES)
def test_fifty_steps(source: str, options: dict[str, Any]) -> None:
    theirs = peer(source, MODULE, NAME, peer_losses.MultipleNegativesRankingLoss)
    ours = MultipleNegativesRankingLoss(Embed(), **options)
    assert_same_training(ours, theirs(Embed(), **options), triplets)


def loss_and_gradients(loss_fn: nn.Module, shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Of columns (B, 6), one for each number in ``shapes``."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in shapes]
    for column in rows:
        column.requires_grad_()
    loss = loss_fn(columns(rows), None)
    return [loss.detach(), *torch.autograd.grad(loss, rows, materialize_grads=True)]


CHOICES = [
    ("query_to_doc", *further)
    for count in range(4)
    for further in itertools.combinations(ALL[1:], count)
]


@pytest.mark.parametrize("shapes", [(5, 5), (5, 5, 5, 5), (1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("directions", CHOICES, ids="+".join)
def test_every_choice_of_directions(directions: tuple[str, ...], shapes: tuple[int, ...]) -> None:
    options: dict[str, Any] = {"directions": directions, "scale": 3.0}
    actual = loss_and_gradients(MultipleNegativesRankingLoss(Embed(), **options), shapes)
    expected = loss_and_gradients(
        peer_losses.MultipleNegativesRankingLoss(Embed(), **options), shapes
    )
    assert actual[0] >= 0
    for ours, theirs in zip(actual, expected, strict=True):
        # Gradients of a single pair are 0, and the formula leaves a rounding error.
        theirs = theirs.where(theirs.abs() > 1e-15, 0.0)
        assert relative_error(ours, theirs) <= FLOOR_GRADIENT[torch.float64]


def on_a_rank(make: Any, options: dict[str, Any]) -> list[Tensor]:
    loss_fn = make(Embed(), gather_across_devices=True, **options)
    return loss_and_gradients(loss_fn, (4, 4, 4), seed=dist.get_rank())


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("source", SOURCES)
def test_two_ranks(source: str, options: dict[str, Any], ranks: Callable[[int], Ranks]) -> None:
    theirs = peer(source, MODULE, NAME, peer_losses.MultipleNegativesRankingLoss)
    actual = ranks(2).run(on_a_rank, MultipleNegativesRankingLoss, options)
    expected = ranks(2).run(on_a_rank, theirs, options)
    for of_ours, of_theirs in zip(actual, expected, strict=True):
        for ours, gradient in zip(of_ours, of_theirs, strict=True):
            assert relative_error(ours, gradient) <= FLOOR_GRADIENT[torch.float64]


def test_gathering_without_a_group_is_one_process() -> None:
    alone, gathered = (
        loss_and_gradients(MultipleNegativesRankingLoss(Embed(), gather_across_devices=g), (5, 5))
        for g in (False, True)
    )
    assert torch.equal(alone[0], gathered[0])


def named(name: str) -> Callable[..., Tensor]:
    """A function that says it is one of ``sentence_transformers.util``."""

    def function(a: Tensor, b: Tensor) -> Tensor:
        raise AssertionError("the loss only looks at its name")

    function.__name__ = name
    function.__module__ = "sentence_transformers.util.similarity"
    return function


def similarity(name: str) -> Callable[..., Tensor]:
    """The function itself where the project is installed."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return named(name)
    function: Callable[..., Tensor] = getattr(
        importlib.import_module("sentence_transformers.util"), name
    )
    return function


@pytest.mark.parametrize("name", ["cos_sim", "dot_score"])
def test_similarities_of_the_project(name: str) -> None:
    options = {"similarity_fct": similarity(name), "scale": 0.5}
    loss_fn = MultipleNegativesRankingLoss(Embed(), **options)
    actual = loss_and_gradients(loss_fn, (5, 5))
    expected = loss_and_gradients(
        peer_losses.MultipleNegativesRankingLoss(Embed(), **options), (5, 5)
    )
    assert relative_error(actual[0], expected[0]) <= FLOOR_VALUE[torch.float64]
    assert loss_fn.get_config_dict()["similarity_fct"] == name
    assert "1807.03748" in loss_fn.citation


def test_the_default_similarity_is_the_cosine() -> None:
    a, b = torch.randn(2, 3, 4)
    expected = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
    torch.testing.assert_close(cos_sim(a, b), expected)


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    return -torch.cdist(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be positive"),
        ({"similarity_fct": euclidean}, "similarity_fct must be cos_sim or dot_score .* euclidean"),
        ({"similarity_fct": named("euclidean_sim")}, "similarity_fct must be .* euclidean_sim"),
        ({"directions": ("doc_to_query",)}, "directions must be some of"),
        (
            {"directions": ("query_to_doc", "doc_to_all")},
            "directions must be some of .*doc_to_all",
        ),
        ({"partition_mode": "each"}, "partition_mode must be one of"),
        ({"directions": ALL, "partition_mode": "per_direction"}, 'partition_mode must be "joint"'),
        ({"hardness_mode": "hardest"}, "hardness_mode must be one of"),
        ({"hardness_strength": -1.0}, "hardness_strength must not be negative"),
        (
            {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
            "hardness_mode must be None, .* stay with sentence_transformers.losses",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_covered_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultipleNegativesRankingLoss(Embed(), **options)


def test_a_mode_without_strength_warns() -> None:
    with pytest.warns(UserWarning, match="no effect"):
        MultipleNegativesRankingLoss(Embed(), hardness_mode="all_negatives")


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((6, 4), (3, 4)), r"embeddings\[1\] must have as many rows as embeddings\[0\], 6, got 3"),
        (((6, 4), (6, 5)), r"embeddings\[0\] and embeddings\[1\] must have the same D"),
        (((6, 4), (6, 4), (6, 5)), r"embeddings\[0\] and embeddings\[2\] must have the same D"),
        (((4,), (4,)), r"embeddings\[0\] must be \(B, D\), got \(4,\)"),
    ],
    ids=["rows", "features", "third", "shape"],
)
def test_columns_that_do_not_fit_are_named(
    options: dict[str, Any], shapes: tuple[tuple[int, ...], ...], message: str
) -> None:
    loss_fn = MultipleNegativesRankingLoss(Embed(), **options)
    with pytest.raises(ValueError, match=message):
        loss_fn(columns([torch.ones(shape) for shape in shapes]), None)


def test_a_third_column_of_other_length() -> None:
    """Only similarities of documents with documents need as many rows in every column."""
    loss_fn = MultipleNegativesRankingLoss(Embed(), directions=ALL)
    with pytest.raises(ValueError, match=r"embeddings\[2\] must have as many rows .* 6, got 5"):
        loss_fn(columns([torch.ones(n, 4) for n in (6, 6, 5)]), None)
    loss = MultipleNegativesRankingLoss(Embed())(
        columns([torch.eye(6)[:n] for n in (6, 6, 5)]), None
    )
    assert loss.isfinite()


def test_one_column_is_named() -> None:
    with pytest.raises(ValueError, match="two columns or more, got 1"):
        MultipleNegativesRankingLoss(Embed())(columns([torch.eye(3)]), torch.empty(0))
