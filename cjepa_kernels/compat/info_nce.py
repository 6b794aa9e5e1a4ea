"""The losses of ``info-nce-pytorch``: ``from cjepa_kernels.compat.info_nce import InfoNCE``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cjepa_kernels import functional, reference
from cjepa_kernels.compat.normalisation import EPS, normalised
from cjepa_kernels.compat.representation import shown
from cjepa_kernels.definitions import Reduction, accumulation_dtype
from cjepa_kernels.functional import checks, dispatch
from cjepa_kernels.functional.anchors import softplus

MODES = ("unpaired", "paired")


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: Reduction = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """``info_nce.info_nce``: InfoNCE of queries, their keys and further keys.

    The arguments, their order and their defaults are those of info-nce-pytorch 0.1.4.

    Args:
        query: (N, D).
        positive_key: (N, D); row k is the positive of row k of ``query``.
        negative_keys: (M, D), the negatives of every query, or with ``negative_mode="paired"``
            (N, M, D), each query's own. They are then the only negatives. Default: the other
            queries' keys.
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,), which then gets a
            gradient.
        reduction: ``mean`` over the queries, ``sum`` or ``none``.
        negative_mode: ``unpaired`` or ``paired``. Negatives of their own take plain PyTorch, which
            holds the (N, M) similarities: no kernel can share the products of such negatives.

    Returns:
        () for ``mean`` and ``sum``, (N,) for ``none``; fp32 (fp64 for fp64 inputs).

    Raises:
        TypeError: A tensor of the wrong kind or dtype.
        ValueError: A wrong shape, device or value; the message names it.

    Source: InfoNCE, arXiv 1807.03748, equation 4.

    Example:
        >>> info_nce(torch.eye(4), torch.eye(4), temperature=0.5)
        tensor(0.3408)
    """
    _check_mode(negative_mode)
    checks.check_rectangle(query, positive_key, names=("query", "positive_key"))
    if len(query) != len(positive_key):
        raise ValueError(
            "query and positive_key must have as many rows as each other, got "
            f"{len(query)} and {len(positive_key)}"
        )
    if negative_keys is not None and negative_mode == "paired":
        checks.check_temperature_device(temperature, "query", query)
        return _paired(query, positive_key, negative_keys, temperature, reduction)
    if negative_keys is not None:
        checks.check_floating_tensor("negative_keys", negative_keys)
        if negative_keys.ndim != 2:
            raise ValueError(
                'negative_keys must be (M, D) with negative_mode="unpaired", got '
                f"{tuple(negative_keys.shape)}"
            )
        checks.check_rows("negative_keys", negative_keys, may_be_empty=True)
        checks.check_same_features(query, negative_keys, names=("query", "negative_keys"))
    return functional.info_nce(
        query,
        positive_key,
        negative_keys,
        temperature=temperature,
        in_batch_negatives=negative_keys is None,
        eps=EPS,
        reduction=reduction,
    ).loss


class InfoNCE(nn.Module):
    """``info_nce.InfoNCE``: :func:`cjepa_kernels.compat.info_nce.info_nce` as a module.

    The arguments, their order and their defaults are those of info-nce-pytorch 0.1.4.

    Args:
        temperature: Float from 1e-30 to 1e30, or a tensor of shape () or (1,), which then gets a
            gradient.
        reduction: ``mean`` over the queries, ``sum`` or ``none``.
        negative_mode: Whether ``negative_keys`` are those of every query (``unpaired``), or each
            query has its own (``paired``).

    Raises:
        ValueError, TypeError: A bad argument; the message names it.

    Source: InfoNCE, arXiv 1807.03748, equation 4.

    Example:
        >>> InfoNCE(temperature=0.5)(torch.eye(4), torch.eye(4))
        tensor(0.3408)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: Reduction = "mean",
        negative_mode: str = "unpaired",
    ) -> None:
        super().__init__()
        checks.check_temperature(temperature)
        checks.check_reduction(reduction)
        _check_mode(negative_mode)
        self.temperature = temperature
        self.reduction: Reduction = reduction
        self.negative_mode = negative_mode

    def forward(
        self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch.

        Args:
            query: (N, D).
            positive_key: (N, D); row k is the positive of row k of ``query``.
            negative_keys: (M, D), or (N, M, D) with ``negative_mode="paired"``.
        """
        return info_nce(
            query,
            positive_key,
            negative_keys,
            temperature=self.temperature,
            reduction=self.reduction,
            negative_mode=self.negative_mode,
        )

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        return shown(self, "temperature", "reduction", "negative_mode")


def _check_mode(negative_mode: str) -> None:
    if negative_mode not in MODES:
        raise ValueError(f"negative_mode must be one of {list(MODES)}, got {negative_mode!r}")


def _paired(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor,
    temperature: float | Tensor,
    reduction: Reduction,
) -> Tensor:
    """InfoNCE where each query has negatives of its own.

    The rows of ``negative_keys`` are divided by their norms after the product, so that no copy of
    them is made and saved.
    """
    checks.check_temperature(temperature)
    checks.check_reduction(reduction)
    checks.check_floating_tensor("negative_keys", negative_keys)
    rows, features = query.shape
    if negative_keys.ndim != 3 or negative_keys.shape[::2] != (rows, features):
        raise ValueError(
            f'negative_keys must be ({rows}, M, {features}) with negative_mode="paired", got '
            f"{tuple(negative_keys.shape)}"
        )
    checks.check_same_device("query and negative_keys", query, negative_keys)
    dtype = accumulation_dtype(
        torch.promote_types(
            torch.promote_types(query.dtype, positive_key.dtype), negative_keys.dtype
        )
    )
    with dispatch.without_autocast(query.device):
        queries, keys = normalised(query.to(dtype)), normalised(positive_key.to(dtype))
        negative_keys = negative_keys.to(dtype)
        positive = (queries * keys).sum(dim=1, keepdim=True)  # (N, 1)
        norms = torch.linalg.vector_norm(negative_keys, dim=2).clamp_min(EPS)  # (N, M)
        similarity = (negative_keys @ queries.unsqueeze(2)).squeeze(2) / norms  # (N, M)
        gap = ((similarity - positive) / temperature).logsumexp(dim=1)  # (N,)
        return reference.reduce(softplus(gap), reduction)
