"""Losses of ``sentence_transformers``, each by its own name.

``from cjepa_kernels.compat.sentence_transformers import MultipleNegativesRankingLoss``
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cjepa_kernels.compat.gathered import gather_rows, own_rows, world_size
from cjepa_kernels.compat.normalisation import EPS, normalised
from cjepa_kernels.compat.representation import shown
from cjepa_kernels.functional import checks
from cjepa_kernels.functional.anchors import softplus
from cjepa_kernels.functional.cross_logsumexp import paired_logsumexp
from cjepa_kernels.functional.info_nce import info_nce

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
PARTITION_MODES = ("joint", "per_direction")
HARDNESS_MODES = (None, "in_batch_negatives", "hard_negatives", "all_negatives")
# The functions of sentence_transformers.util that the loss knows, and whether rows are normalised.
SIMILARITIES = {"cos_sim": True, "pytorch_cos_sim": True, "dot_score": False}


def cos_sim(a: Tensor, b: Tensor) -> Tensor:
    """(M, N) cosine similarities of the rows of ``a`` and ``b``, as in sentence_transformers."""
    return normalised(a) @ normalised(b).T


class MultipleNegativesRankingLoss(nn.Module):
    """``sentence_transformers.losses.MultipleNegativesRankingLoss`` without its matrices of scores.

    The arguments, their order and their defaults are those of sentence-transformers 6.2.0.

    Args:
        model: The model. It takes the features of a column and returns a dict with
            ``sentence_embedding`` (B, D).
        scale: Positive factor of the similarities, the inverse of a temperature. Default 20.
        similarity_fct: ``cos_sim`` or ``dot_score``, those of ``sentence_transformers.util``.
        gather_across_devices: Take the documents and the queries of all ranks as negatives.
        directions: Which similarities take part: ``query_to_doc``, and further ``query_to_query``,
            ``doc_to_query`` and ``doc_to_doc``.
        partition_mode: ``joint``, one softmax over all directions, or ``per_direction``, the mean
            of one softmax each.
        hardness_mode: Only None, or a mode with a strength of 0, which has no effect.
        hardness_strength: Only 0 with a ``hardness_mode``.

    Raises:
        ValueError: An argument that is wrong or not covered; the message names it.

    Source: InfoNCE, arXiv 1807.03748, equation 4; all directions as in GTE, arXiv 2308.03281.

    Example:
        >>> embed = lambda x: {"sentence_embedding": x}
        >>> loss_fn = MultipleNegativesRankingLoss(embed, scale=2.0)
        >>> loss_fn([torch.eye(4), torch.eye(4)], labels=None)
        tensor(0.3408)
    """

    def __init__(
        self,
        model: Callable[[Any], dict[str, Tensor]],
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[str, ...] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__()
        checks.check_in_range("scale", scale)
        if isinstance(directions, str):
            raise ValueError(
                f"directions must be a tuple or a list of names, got the name {directions!r} alone"
            )
        directions = tuple(directions)
        if "query_to_doc" not in directions or not set(directions) <= set(DIRECTIONS):
            raise ValueError(
                f'directions must be some of {list(DIRECTIONS)}, "query_to_doc" among them, got '
                f"{list(directions)}"
            )
        if partition_mode not in PARTITION_MODES:
            raise ValueError(
                f"partition_mode must be one of {list(PARTITION_MODES)}, got {partition_mode!r}"
            )
        if partition_mode == "per_direction" and set(directions) & {"query_to_query", "doc_to_doc"}:
            raise ValueError(
                'partition_mode must be "joint" with "query_to_query" or "doc_to_doc", which hold '
                'no positive, got "per_direction"'
            )
        _check_hardness(hardness_mode, hardness_strength)
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.use_cosine_similarity = _is_cosine(similarity_fct)
        self.gather_across_devices = gather_across_devices
        self.directions = directions
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            sentence_features: The features of the columns: anchors, positives and, optionally, more
                columns of negatives.
            labels: Not used.
        """
        embeddings = _embed_columns(self.model, sentence_features)
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """The loss of the embeddings of the columns.

        Args:
            embeddings: Two or more tensors (B, D): anchors, positives, and columns of negatives.
            labels: Not used.

        Returns:
            () fp32 (fp64 for fp64 embeddings).
        """
        if len(embeddings) < 2:
            raise ValueError(
                f"sentence_features must have two columns or more, got {len(embeddings)}"
            )
        self._check(embeddings)
        query, *documents = embeddings
        own: Tensor | None = None  # (B,) where this rank's rows are among those of all ranks
        all_queries, all_documents = query, documents
        if self.gather_across_devices and world_size() > 1:
            own = own_rows(query)
            all_queries = gather_rows(query, with_gradient=True)
            all_documents = [gather_rows(rows, with_gradient=True) for rows in documents]
        if self.partition_mode == "joint" and len(self.directions) > 1:
            return self._joint(query, documents[0], all_queries, all_documents, own)
        options = self._options()
        symmetric = "doc_to_query" in self.directions
        loss = info_nce(
            query,
            all_documents[0],
            torch.cat(all_documents[1:]) if len(documents) > 1 else None,
            positives=own,
            symmetric=symmetric and own is None,
            **options,
        ).loss
        if symmetric and own is not None:
            of_documents = info_nce(documents[0], all_queries, positives=own, **options).loss
            loss = (loss + of_documents) / 2
        return loss

    def _check(self, embeddings: list[Tensor]) -> None:
        """Raise unless the columns are rows of the same features, with one document per query."""
        for number, column in enumerate(embeddings[1:], start=1):
            names = ("embeddings[0]", f"embeddings[{number}]")
            checks.check_rows(names[0], embeddings[0], letter="B")
            checks.check_rows(names[1], column, letter="B", may_be_empty=number > 1)
            checks.check_same_features(embeddings[0], column, names=names)
            one_per_query = number == 1 or "doc_to_doc" in self.directions
            if one_per_query and len(column) != len(embeddings[0]):
                raise ValueError(
                    f"{names[1]} must have as many rows as embeddings[0], {len(embeddings[0])}, "
                    f"got {len(column)}"
                )

    def _joint(
        self,
        query: Tensor,
        document: Tensor,
        all_queries: Tensor,
        all_documents: list[Tensor],
        own: Tensor | None,
    ) -> Tensor:
        """One softmax over the similarities of all directions.

        With s the similarity of a query and its document,

            loss = log(sum over all directions of exp(s_b / tau)) - s / tau

        Each rectangle leaves out the column of the query's own sample, so the sum is 1 and the
        exponentials of the differences LSE- - s / tau. ``doc_to_query`` holds the positive once
        more.
        """
        if own is None:
            own = torch.arange(len(query), device=query.device)
        options = self._options()
        of_query = paired_logsumexp(query, torch.cat(all_documents), own, **options)
        positive = of_query.positive * self.scale  # (B,)
        sums = []
        if len(all_documents) * len(all_queries) > 1:
            sums.append(of_query.row_lse)
        if len(all_queries) > 1:
            pairs = []
            if "query_to_query" in self.directions:
                pairs.append((query, all_queries))
            if "doc_to_query" in self.directions:
                pairs.append((document, all_queries))
            if "doc_to_doc" in self.directions:
                pairs += [(document, column) for column in all_documents]
            sums += [paired_logsumexp(x, y, own, **options).row_lse for x, y in pairs]
        gaps = [lse - positive for lse in sums]
        if "doc_to_query" in self.directions:
            gaps.append(0 * positive)
        if not gaps:
            return 0 * positive.sum()
        return softplus(torch.stack(gaps).logsumexp(dim=0)).mean()

    def _options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "use_cosine_similarity": self.use_cosine_similarity,
            "eps": EPS,
        }

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        names = ("scale", "similarity_fct", "gather_across_devices", "directions")
        return shown(self, *names, "partition_mode", "hardness_mode", "hardness_strength")

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the card of a model."""
        return {
            "scale": self.scale,
            "similarity_fct": self.similarity_fct.__name__,
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
        }

    @property
    def citation(self) -> str:
        """The source in BibTeX, for the card of a model."""
        return (
            "@misc{oord2018representation,\n"
            "    title = {Representation Learning with Contrastive Predictive Coding},\n"
            "    author = {van den Oord, Aaron and Li, Yazhe and Vinyals, Oriol},\n"
            "    year = {2018},\n"
            "    eprint = {1807.03748},\n"
            "    archivePrefix = {arXiv},\n"
            "}"
        )

    @property
    def temperature(self) -> float:
        """The inverse of the scale."""
        return 1 / checks.as_float(self.scale)


def _is_cosine(similarity_fct: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether a known function normalises the rows."""
    name = getattr(similarity_fct, "__name__", repr(similarity_fct))
    package = getattr(similarity_fct, "__module__", "").partition(".")[0]
    if similarity_fct is cos_sim:
        return True
    if package != "sentence_transformers" or name not in SIMILARITIES:
        raise ValueError(
            "similarity_fct must be cos_sim or dot_score of sentence_transformers.util, got "
            f"{name}: stay with sentence_transformers.losses for other functions"
        )
    return SIMILARITIES[name]


def _check_hardness(mode: str | None, strength: float) -> None:
    if mode not in HARDNESS_MODES:
        raise ValueError(f"hardness_mode must be one of {list(HARDNESS_MODES)}, got {mode!r}")
    if strength < 0:
        raise ValueError(f"hardness_strength must not be negative, got {strength}")
    if mode is not None and strength > 0:
        raise ValueError(
            f"hardness_mode must be None, got {mode!r} with hardness_strength={strength}: stay "
            "with sentence_transformers.losses for weights of hard negatives"
        )
    if mode is not None:
        warnings.warn(
            f"hardness_mode={mode!r} has no effect with hardness_strength=0", stacklevel=3
        )


def _embed_columns(
    model: Callable[[Any], dict[str, Tensor]], sentence_features: Iterable[dict[str, Tensor]]
) -> list[Tensor]:
    """The embeddings of each column.

    Newer versions of sentence_transformers embed columns together where they can.
    """
    try:
        merged = importlib.import_module("sentence_transformers.base.losses.merged_forward")
    except ImportError:
        return [model(features)["sentence_embedding"] for features in sentence_features]
    embeddings: list[Tensor] = merged.embed_columns(model, sentence_features)
    return embeddings
