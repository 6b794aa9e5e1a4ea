"""NT-Xent as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from cjepa_kernels import reference
from cjepa_kernels.backends import Backend
from cjepa_kernels.definitions import EPS, TEMPERATURE, Reduction, Strategy
from cjepa_kernels.distributed import resolve_group
from cjepa_kernels.functional.checks import check_bool, check_strategy
from cjepa_kernels.functional.nt_xent import classes_of_pairs, nt_xent
from cjepa_kernels.modules.contrastive_module import ContrastiveModule
from cjepa_kernels.modules.distributed_attribute import distributed_attribute
from cjepa_kernels.modules.loss_module import LossResult
from cjepa_kernels.modules.other_projects import refer


class NTXentLoss(ContrastiveModule):
    """Normalised temperature-scaled cross entropy of two views, with monitoring metrics.

    Args:
        temperature: Float from 1e-30 to 1e30, default 0.1. A lower temperature separates hard
            negatives more sharply.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
        reduction: ``mean`` over the 2B anchors, ``sum`` or ``none``.
        eps: Lower bound on the norm used for normalisation. Default 1e-8.
        learnable_temperature: Train log(temperature) as the parameter ``log_temperature``,
            starting at ``temperature``: it stays positive whatever the optimiser does. Keep it out
            of weight decay, which pulls the temperature towards 1.
        temperature_shape: Shape of ``log_temperature``, () or (1,). FSDP cannot shard a 0-dim
            parameter and needs (1,). State dicts of either shape load into either.
        backend: ``auto`` or a name from :func:`cjepa_kernels.backends`.
        decoupled: Leave the positive out of the sum over the negatives (DCL). The loss may then be
            negative, and has no minimum.
        return_logits: Add ``logits`` (2B, 2B + 1) to the result, the positive in column 0,
            divided by the temperature. This builds the matrix that the loss otherwise avoids;
            with ``distributed`` it covers this rank's pairs.
        distributed: Take the negatives from all ranks (True), or from those of a process group,
            as described for ``group`` in :func:`cjepa_kernels.nt_xent`. Without a call of
            ``init_process_group``, True means one process. A learnable temperature
            needs its gradient averaged over the ranks, like every parameter: have the loss be a
            part of the module that DDP wraps. A copy by ``copy.deepcopy`` shares the group. Pickle
            stores the default group as True and refuses any other.
        strategy: How the ranks work together: ``auto``, ``all_gather`` or ``ring``.
        return_dict: Return a dict. With False a call returns the loss alone, as most losses do, and
            the metrics of the last call are the attribute ``last_metrics``.

    Raises:
        ValueError, TypeError: A bad argument; the message names it.
        RuntimeError: A back end that was asked for by name and is missing.

    Source: SimCLR, arXiv 2002.05709; ``decoupled`` as in DCL, arXiv 2110.06848.

    Example:
        >>> loss_fn = NTXentLoss(temperature=0.1)
        >>> out = loss_fn(torch.eye(4), torch.eye(4))
        >>> sorted(out)
        ['accuracy', 'loss', 'negative_similarity', 'positive_similarity']
    """

    distributed: bool | ProcessGroup = distributed_attribute(
        "Whether negatives come from all ranks, or the process group that they come from."
    )
    decoupled: bool = False  # for modules that were pickled before they had it

    @refer(
        memory_bank_size="cjepa_kernels.compat.lightly.NTXentLoss has lightly's arguments",
        gather_distributed=(
            "here it is distributed=True, and cjepa_kernels.compat.lightly.NTXentLoss has "
            "lightly's arguments"
        ),
    )
    def __init__(
        self,
        temperature: float = TEMPERATURE,
        use_cosine_similarity: bool = True,
        reduction: Reduction = "mean",
        eps: float = EPS,
        *,
        learnable_temperature: bool = False,
        temperature_shape: Sequence[int] = (),
        decoupled: bool = False,
        backend: Backend = "auto",
        return_logits: bool = False,
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
        check_bool("decoupled", decoupled)
        check_strategy(strategy)
        self.decoupled = decoupled
        self.return_logits = return_logits
        self.distributed = distributed
        self.strategy = strategy

    def forward(
        self,
        z_i: Tensor,
        z_j: Tensor,
        mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
    ) -> LossResult:
        """Loss and metrics of a batch of pairs.

        Args:
            z_i: (B, D) or (B, N, D) embeddings of the first view.
            z_j: Same shape; ``z_j[k]`` is the positive of ``z_i[k]``.
            mask: Optional (B, B) bool, True takes the pair of samples out of the negatives.
            labels: Optional (B,) integers; samples of equal label are no negatives of each other.
                With 3-D views also (B, N).

        Returns:
            ``loss``, ``accuracy``, ``positive_similarity``, ``negative_similarity`` and, with
            ``return_logits``, ``logits``. The metrics are detached 0-dim tensors on the device.
            With ``return_dict=False`` the loss alone.
        """
        settings = self._settings()
        out = nt_xent(
            z_i,
            z_j,
            mask=mask,
            labels=labels,
            decoupled=self.decoupled,
            group=resolve_group(self.distributed),
            strategy=self.strategy,
            **settings,
        )
        result = {
            "loss": out.loss,
            "accuracy": out.accuracy,
            "positive_similarity": out.positive_similarity,
            "negative_similarity": out.negative_similarity,
        }
        if self.return_logits:
            if labels is not None:
                classes = classes_of_pairs(labels, z_i)
                mask = classes[:, None] == classes
            result["logits"] = reference.nt_xent_logits(
                z_i.flatten(0, -2),
                z_j.flatten(0, -2),
                temperature=settings["temperature"],
                use_cosine_similarity=self.use_cosine_similarity,
                eps=self.eps,
                mask=mask,
            )
        return self._result(result)

    def _own_settings(self) -> dict[str, Any]:
        return {"decoupled": True} if self.decoupled else {}
