"""Losses of ``pytorch_metric_learning``, each by its own name.

``from cjepa_kernels.compat.pytorch_metric_learning import NTXentLoss``
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cjepa_kernels.compat.labelled import Classes, LabelledRows
from cjepa_kernels.compat.normalisation import EPS
from cjepa_kernels.compat.representation import shown
from cjepa_kernels.functional import checks
from cjepa_kernels.functional.nt_xent import nt_xent

STAY = "stay with pytorch_metric_learning.losses"


class _LabelledLoss(nn.Module):
    """A loss of rows and their labels, with the arguments of that library's losses.

    Args:
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,).
        distance: None, or that library's ``CosineSimilarity`` or ``DotProductSimilarity``.
        reducer: None, or the library's default reducer of this loss.
        collect_stats: Must not be True.
        embedding_regularizer: Must be None.
        embedding_reg_weight: Not used.
        unknown: Must be empty.
    """

    default_reducer = ""

    def __init__(
        self,
        temperature: float | Tensor,
        distance: Any = None,
        reducer: Any = None,
        collect_stats: bool | None = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise TypeError(
                f"{type(self).__name__}.__init__() got an unexpected keyword argument "
                f"{next(iter(unknown))!r}"
            )
        checks.check_temperature(temperature)
        if reducer is not None and type(reducer).__name__ != self.default_reducer:
            raise ValueError(
                f"reducer must be None or {self.default_reducer}, got {type(reducer).__name__}: "
                f"{STAY} for other reducers"
            )
        if collect_stats:
            raise ValueError(
                f"collect_stats must not be True, got {collect_stats!r}: {STAY} for statistics"
            )
        if embedding_regularizer is not None:
            raise ValueError(
                "embedding_regularizer must be None, got "
                f"{type(embedding_regularizer).__name__}: add the regularisation to the loss "
                f"yourself, or {STAY}"
            )
        self.temperature = temperature
        self.distance = distance
        self.use_cosine_similarity = _is_cosine(distance)
        self.reducer = reducer

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: (M, D).
            labels: (M,) classes. The host reads them, and waits for the device to do so.
            indices_tuple: Must be None.
            ref_emb: Optional (N, D) rows that ``embeddings`` are compared with. Default:
                ``embeddings`` themselves; then no row is compared with itself.
            ref_labels: (N,) classes of ``ref_emb``; not used without ``ref_emb``. If it is
                ``labels`` itself and not a copy, row k is not compared with row k of ``ref_emb``,
                as in the library.

        Returns:
            () fp32 (fp64 for fp64 embeddings); 0 with a gradient of 0 where there is no positive or
            no negative pair.
        """
        if indices_tuple is not None:
            raise ValueError(
                f"indices_tuple must be None, got {type(indices_tuple).__name__}: {STAY} for miners"
            )
        checks.check_rectangle(
            embeddings,
            embeddings if ref_emb is None else ref_emb,
            names=("embeddings", "ref_emb"),
        )
        checks.check_temperature_device(self.temperature, "embeddings", embeddings)
        _check_labels("labels", labels, "embeddings", embeddings)
        assert labels is not None
        if ref_emb is None:
            ref_labels = None
        else:
            _check_labels("ref_labels", ref_labels, "ref_emb", ref_emb)
            # The library takes the same tensor of labels as a sign that row k and row k of ref_emb
            # are the same sample, and leaves these pairs out. It moves labels to the device first.
            if ref_labels is labels and labels.device == embeddings.device:
                ref_labels = None
                ref_emb = None if ref_emb is embeddings else ref_emb
        classes = Classes.of(labels, ref_labels)
        pairs = int(classes.positives.sum())
        others = classes.of_rows.numel() * classes.of_keys.numel() - pairs
        others -= classes.of_rows.numel() * int(classes.without_own)
        if pairs == 0 or others == 0 or max(pairs, others) <= 1:
            return (embeddings * 0).sum()
        return self._loss(embeddings, ref_emb, classes)

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        return shown(self, "temperature", "distance", "reducer")

    def _loss(self, embeddings: Tensor, ref_emb: Tensor | None, classes: Classes) -> Tensor:
        """The loss of a batch that has positive and negative pairs; each subclass has its own."""
        raise NotImplementedError

    def _rows(self, embeddings: Tensor, ref_emb: Tensor | None, classes: Classes) -> LabelledRows:
        return LabelledRows(
            embeddings,
            ref_emb,
            classes,
            temperature=self.temperature,
            use_cosine_similarity=self.use_cosine_similarity,
        )


class NTXentLoss(_LabelledLoss):
    """``pytorch_metric_learning.losses.NTXentLoss`` without its table of pairs and negatives.

    The arguments, their order and their defaults are those of pytorch-metric-learning 2.9.0.

    Args:
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,), which then gets a
            gradient. Default 0.07.
        kwargs: ``distance``: ``CosineSimilarity`` (the default) or ``DotProductSimilarity``.
            ``reducer``: only ``MeanReducer``, the default. ``collect_stats`` and
            ``embedding_regularizer`` must stay at their defaults.

    Raises:
        ValueError: An argument that is wrong or not covered; the message names it.

    Source: the pairs of one class as InfoNCE, arXiv 1807.03748, equation 4.

    Example:
        >>> loss_fn = NTXentLoss(temperature=0.5)
        >>> loss_fn(torch.eye(4), torch.tensor([0, 0, 1, 1]))  # log(1 + 2)
        tensor(1.0986)
    """

    default_reducer = "MeanReducer"

    def __init__(self, temperature: float | Tensor = 0.07, **kwargs: Any) -> None:
        super().__init__(temperature, **kwargs)

    def _loss(self, embeddings: Tensor, ref_emb: Tensor | None, classes: Classes) -> Tensor:
        if ref_emb is None and bool((classes.sizes == 2).all()):  # two views of each sample
            first, second = classes.of_rows.argsort(stable=True).to(embeddings.device).view(-1, 2).T
            return nt_xent(
                embeddings[first],
                embeddings[second],
                temperature=self.temperature,
                use_cosine_similarity=self.use_cosine_similarity,
                eps=EPS,
            ).loss
        return self._rows(embeddings, ref_emb, classes).nt_xent()


class SupConLoss(_LabelledLoss):
    """``pytorch_metric_learning.losses.SupConLoss`` without its (M, M) matrices.

    The arguments, their order and their defaults are those of pytorch-metric-learning 2.9.0.

    Args:
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,), which then gets a
            gradient. Default 0.1.
        kwargs: ``distance``: ``CosineSimilarity`` (the default) or ``DotProductSimilarity``.
            ``reducer``: only ``AvgNonZeroReducer``, the default. ``collect_stats`` and
            ``embedding_regularizer`` must stay at their defaults.

    Raises:
        ValueError: An argument that is wrong or not covered; the message names it.

    Source: SupCon, arXiv 2004.11362, equation 2.

    Example:
        >>> loss_fn = SupConLoss(temperature=0.5)
        >>> loss_fn(torch.eye(4), torch.tensor([0, 0, 1, 1]))  # log 3
        tensor(1.0986)
    """

    default_reducer = "AvgNonZeroReducer"

    def __init__(self, temperature: float | Tensor = 0.1, **kwargs: Any) -> None:
        super().__init__(temperature, **kwargs)

    def _loss(self, embeddings: Tensor, ref_emb: Tensor | None, classes: Classes) -> Tensor:
        losses = self._rows(embeddings, ref_emb, classes).sup_con()
        # The library's losses below this bound round to 0, which its mean leaves out.
        counts = ~(losses.detach() <= torch.finfo(losses.dtype).eps / 2)  # a NaN counts
        return losses.where(counts, 0.0).sum() / counts.sum().clamp(min=1)


class SelfSupervisedLoss(nn.Module):
    """``pytorch_metric_learning.losses.SelfSupervisedLoss`` around a loss of this module.

    Args:
        loss: :class:`cjepa_kernels.compat.pytorch_metric_learning.NTXentLoss` or
            :class:`cjepa_kernels.compat.pytorch_metric_learning.SupConLoss`.
        symmetric: Compare all rows of both views with each other. With False, compare the rows of
            ``embeddings`` with those of ``ref_emb``.

    Raises:
        ValueError: Another loss.

    Source: SimCLR, arXiv 2002.05709.

    Example:
        >>> loss_fn = SelfSupervisedLoss(NTXentLoss(temperature=0.5))
        >>> loss_fn(torch.eye(4), torch.eye(4))
        tensor(0.5944)
    """

    def __init__(self, loss: nn.Module, symmetric: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(loss, _LabelledLoss):
            raise ValueError(
                "loss must be NTXentLoss or SupConLoss of "
                f"cjepa_kernels.compat.pytorch_metric_learning, got {type(loss).__name__}: "
                f"{STAY} for other losses"
            )
        self.loss = loss
        self.symmetric = symmetric

    def forward(self, embeddings: Tensor, ref_emb: Tensor) -> Tensor:
        """The loss of a batch of pairs.

        Args:
            embeddings: (B, D).
            ref_emb: (B, D); row k is a view of the sample of row k of ``embeddings``.
        """
        names = ("embeddings", "ref_emb")
        checks.check_views(embeddings, ref_emb, allow_empty=False, names=names)
        labels = torch.arange(len(embeddings), device="cpu")
        loss: Tensor
        if self.symmetric:
            loss = self.loss(torch.cat([embeddings, ref_emb]), labels.repeat(2))
        else:
            loss = self.loss(embeddings, labels, ref_emb=ref_emb, ref_labels=labels.clone())
        return loss

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        return shown(self, "symmetric")


def _is_cosine(distance: Any) -> bool:
    """Whether a distance of that library normalises the rows; raise for one that is not known."""
    if distance is None:
        return True
    name = type(distance).__name__
    known = name in ("CosineSimilarity", "DotProductSimilarity")
    p, power = getattr(distance, "p", 2), getattr(distance, "power", 1)
    if known and p == 2 and power == 1:
        return bool(getattr(distance, "normalize_embeddings", True))
    raise ValueError(
        "distance must be CosineSimilarity or DotProductSimilarity with p=2 and power=1, got "
        f"{name} with p={p} and power={power}: {STAY} for other distances"
    )


def _check_labels(name: str, labels: Tensor | None, of: str, rows: Tensor) -> None:
    if labels is None:
        raise ValueError(f"{name} must be given with {of}, got None")
    if not isinstance(labels, Tensor) or labels.shape != rows.shape[:1]:
        shape = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"{name} must be ({len(rows)},), one for each row of {of}, got {shape}")
