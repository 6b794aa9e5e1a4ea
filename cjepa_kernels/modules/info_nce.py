"""InfoNCE as a module; with ``symmetric=True`` it is the loss of CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cjepa_kernels.backends import Backend
from cjepa_kernels.definitions import EPS, FLOATING, INFO_NCE_TEMPERATURE, Reduction, Strategy
from cjepa_kernels.distributed import resolve_group
from cjepa_kernels.functional.checks import (
    check_bool,
    check_in_batch_negatives,
    check_label_smoothing,
    check_ring_of_keys,
    check_strategy,
    described,
)
from cjepa_kernels.functional.info_nce import info_nce
from cjepa_kernels.modules.contrastive_module import ContrastiveModule
from cjepa_kernels.modules.distributed_attribute import distributed_attribute
from cjepa_kernels.modules.float_attribute import float_attribute
from cjepa_kernels.modules.loss_module import LossResult
from cjepa_kernels.modules.other_projects import refer


def _as_temperature(logit_scale: Tensor, query: Tensor) -> Tensor:
    """1 / scale of a checked scale, in fp32 or fp64: half precision would round the quotient."""
    if not isinstance(logit_scale, Tensor):
        raise TypeError(f"logit_scale must be a tensor, got {type(logit_scale).__name__}")
    if logit_scale.shape not in ((), (1,)) or logit_scale.dtype not in FLOATING:
        raise ValueError(
            "logit_scale must be a floating-point tensor of shape () or (1,), got "
            f"{described(logit_scale)}"
        )
    if isinstance(query, Tensor) and logit_scale.device != query.device:
        raise ValueError(
            f"logit_scale must be on the device of query, {query.device}, got {logit_scale.device}"
        )
    return logit_scale.to(torch.promote_types(logit_scale.dtype, torch.float32)).reciprocal()


class InfoNCELoss(ContrastiveModule):
    """InfoNCE of queries against keys, with monitoring metrics.

    Args:
        temperature: Float from 1e-30 to 1e30, default 0.07. A lower temperature separates hard
            negatives more sharply.
        symmetric: The mean of both directions, queries among keys and keys among queries, as CLIP
            trains.
        label_smoothing: Share of the target, from 0 to below 1, that is spread over all keys.
            Default 0.
        in_batch_negatives: Whether the other keys are negatives of a query. With False only
            ``negatives`` are, as in MoCo and with a memory bank; ``symmetric`` must then be False.
            Default True.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        reduction: ``mean`` over the queries, ``sum`` or ``none``.
        eps: Lower bound on the norm used for normalisation. Default 1e-8.
        learnable_temperature: Train log(temperature) as the parameter ``log_temperature``,
            starting at ``temperature``: it stays positive whatever the optimiser does. Keep it out
            of weight decay, which pulls the temperature towards 1.
        temperature_shape: Shape of ``log_temperature``, () or (1,). FSDP cannot shard a 0-dim
            parameter and needs (1,). State dicts of either shape load into either.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.
        distributed: Take the keys and ``negatives`` of all ranks (True) or of those of a process
            group as negatives, as described for ``group`` in :func:`cjepa_kernels.info_nce`.
            Without a call of ``init_process_group``, True means one process. A learnable
            temperature needs its gradient averaged over the ranks, like every parameter: have the
            loss be a part of the module that DDP wraps. Copies and pickles: as for
            :class:`NTXentLoss`.
        strategy: How the ranks work together: ``auto``, ``all_gather`` or ``ring``, as described in
            :func:`cjepa_kernels.info_nce`.
        return_dict: Return a dict. With False a call returns the loss alone, as most losses do, and
            the metrics of the last call are the attribute ``last_metrics``.

    Raises:
        ValueError, TypeError: A bad argument; the message names it.
        RuntimeError: A back end that was asked for by name and is missing.

    Source: InfoNCE, arXiv 1807.03748, equation 4; both directions as in CLIP, arXiv 2103.00020;
    negatives from a queue alone as in MoCo, arXiv 1911.05722, equation 1.

    Example:
        >>> loss_fn = InfoNCELoss(symmetric=True)
        >>> image, text = torch.eye(4), torch.eye(4)
        >>> out = loss_fn(image, text)
        >>> out["accuracy"].item()
        1.0
    """

    # For modules that were pickled before they had these attributes.
    in_batch_negatives: bool = True
    strategy: Strategy = "auto"
    distributed: bool | ProcessGroup = distributed_attribute(
        "Whether negatives come from all ranks, or the process group that they come from."
    )
    label_smoothing: float = float_attribute("label_smoothing")

    @refer(
        negative_mode="cjepa_kernels.compat.info_nce.InfoNCE has info-nce-pytorch's arguments",
        local_loss="cjepa_kernels.compat.open_clip.ClipLoss has open_clip's arguments",
        gather_with_grad="cjepa_kernels.compat.open_clip.ClipLoss has open_clip's arguments",
    )
    def __init__(
        self,
        temperature: float = INFO_NCE_TEMPERATURE,
        *,
        symmetric: bool = False,
        label_smoothing: float = 0.0,
        in_batch_negatives: bool = True,
        use_cosine_similarity: bool = True,
        reduction: Reduction = "mean",
        eps: float = EPS,
        learnable_temperature: bool = False,
        temperature_shape: Sequence[int] = (),
        backend: Backend = "auto",
        distributed: bool | ProcessGroup = False,
        strategy: Strategy = "auto",
        return_dict: bool = True,
    ) -> None:
        super().__init__(
            temperature,
            use_cosine_similarity=use_cosine_similarity,
            reduction=reduction,
            eps=eps,
            learnable_temperature=learnable_temperature,
            temperature_shape=temperature_shape,
            backend=backend,
            return_dict=return_dict,
        )
        check_bool("symmetric", symmetric)
        check_label_smoothing(label_smoothing)
        check_in_batch_negatives(in_batch_negatives, symmetric=symmetric)
        check_strategy(strategy)
        check_ring_of_keys(strategy, in_batch_negatives=in_batch_negatives)
        self.symmetric = symmetric
        self.label_smoothing = label_smoothing
        self.in_batch_negatives = in_batch_negatives
        self.strategy = strategy
        self.distributed = distributed
        if distributed is not False and not in_batch_negatives:
            raise ValueError(
                "distributed must be False with in_batch_negatives=False, got "
                f"{'True' if distributed is True else 'a process group'}: "
                "MomentumQueue(distributed=True) exchanges the keys when they are enqueued"
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        positives: Tensor | None = None,
        *,
        logit_scale: Tensor | None = None,
    ) -> LossResult:
        """Loss and metrics of a batch.

        Args:
            query: (M, D).
            key: (N, D); without ``positives`` N = M, and ``key[k]`` is the positive of
                ``query[k]``.
            negatives: Optional (K, D) keys that are nobody's positive. They must be given with
                ``in_batch_negatives=False``.
            positives: Optional (M,) int64, the row of ``key`` that is each query's positive.
            logit_scale: Optional tensor of shape () or (1,), the factor 1 / temperature of the
                logits as CLIP's models return it. It takes the place of the module's temperature
                and gets a gradient. A scale that is not positive gives NaN, because the host never
                reads it.

        Returns:
            ``loss``, ``accuracy``, ``positive_similarity`` and ``negative_similarity``. The metrics
            are detached 0-dim tensors on the device. With ``return_dict=False`` the loss alone.
        """
        settings = self._settings()
        if logit_scale is not None:
            settings["temperature"] = _as_temperature(logit_scale, query)
        out = info_nce(
            query,
            key,
            negatives,
            positives,
            symmetric=self.symmetric,
            label_smoothing=self.label_smoothing,
            in_batch_negatives=self.in_batch_negatives,
            group=resolve_group(self.distributed),
            strategy=self.strategy,
            **settings,
        )
        return self._result(
            {
                "loss": out.loss,
                "accuracy": out.accuracy,
                "positive_similarity": out.positive_similarity,
                "negative_similarity": out.negative_similarity,
            }
        )

    def _own_settings(self) -> dict[str, Any]:
        return {
            "symmetric": self.symmetric,
            "label_smoothing": self.label_smoothing,
            "in_batch_negatives": self.in_batch_negatives,
        }
