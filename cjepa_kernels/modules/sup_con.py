"""SupCon as a module."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from cjepa_kernels.backends import Backend
from cjepa_kernels.definitions import EPS, TEMPERATURE, Reduction
from cjepa_kernels.distributed import resolve_group
from cjepa_kernels.functional.sup_con import sup_con
from cjepa_kernels.modules.contrastive_module import ContrastiveModule
from cjepa_kernels.modules.distributed_attribute import distributed_attribute
from cjepa_kernels.modules.loss_module import LossResult


class SupConLoss(ContrastiveModule):
    """Supervised contrastive loss, or that of several views, with monitoring metrics.

    Args:
        temperature: Float from 1e-30 to 1e30, default 0.1. A lower temperature separates hard
            negatives more sharply.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        reduction: ``mean`` over the anchors that have a positive, ``sum`` or ``none``.
        eps: Lower bound on the norm used for normalisation. Default 1e-8.
        learnable_temperature: Train log(temperature) as the parameter ``log_temperature``,
            starting at ``temperature``: it stays positive whatever the optimiser does. Keep it out
            of weight decay, which pulls the temperature towards 1.
        temperature_shape: Shape of ``log_temperature``, () or (1,). FSDP cannot shard a 0-dim
            parameter and needs (1,). State dicts of either shape load into either.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.
        distributed: Take the positives and the negatives from all ranks (True), or from those of a
            process group, as described for ``group`` in :func:`cjepa_kernels.sup_con`. Every rank
            then does the work of the whole batch. Without a call of ``init_process_group``, True
            means one process. A learnable temperature needs its gradient averaged over the ranks,
            like every parameter: have the loss be a part of the module that DDP wraps. Copies and
            pickles: as for :class:`NTXentLoss`.
        return_dict: Return a dict. With False a call returns the loss alone, as most losses do, and
            the metrics of the last call are the attribute ``last_metrics``.

    Raises:
        ValueError, TypeError: A bad argument; the message names it.
        RuntimeError: A back end that was asked for by name and is missing.

    Source: SupCon, arXiv 2004.11362, equation 2 (the mean outside of the logarithm).

    Example:
        >>> loss_fn = SupConLoss()
        >>> out = loss_fn(torch.eye(4), torch.tensor([0, 0, 1, 2]))
        >>> out["num_anchors"].item()  # the last two rows have no positive
        2
    """

    distributed: bool | ProcessGroup = distributed_attribute(
        "Whether rows of all ranks count, or the process group whose rows count."
    )

    def __init__(
        self,
        temperature: float = TEMPERATURE,
        *,
        use_cosine_similarity: bool = True,
        reduction: Reduction = "mean",
        eps: float = EPS,
        learnable_temperature: bool = False,
        temperature_shape: Sequence[int] = (),
        backend: Backend = "auto",
        distributed: bool | ProcessGroup = False,
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
        self.distributed = distributed

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> LossResult:
        """Loss and metrics of a batch.

        Args:
            embeddings: (M, D) with labels, or (B, V, D), V views of B samples.
            labels: (M,) or (B,) integers; rows of equal label are each other's positives. Without
                labels the views of a sample are.

        Returns:
            ``loss``, ``positive_similarity``, ``negative_similarity`` and ``num_anchors``, the
            number of rows that have a positive. The metrics are detached 0-dim tensors on the
            device. With ``return_dict=False`` the loss alone.
        """
        out = sup_con(
            embeddings,
            labels,
            group=resolve_group(self.distributed),
            **self._settings(),
        )
        return self._result(
            {
                "loss": out.loss,
                "positive_similarity": out.positive_similarity,
                "negative_similarity": out.negative_similarity,
                "num_anchors": out.num_anchors,
            }
        )
