"""NT-Xent of a group of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels import ops
from cjepa_kernels.backends import Backend
from cjepa_kernels.definitions import NTXentOutput, Reduction, Strategy
from cjepa_kernels.distributed import Options
from cjepa_kernels.distributed import nt_xent as distributed_nt_xent
from cjepa_kernels.distributed.whole_batch import WholeBatch
from cjepa_kernels.functional import checks, dispatch
from cjepa_kernels.functional.nt_xent_by_anchors import check_negatives, nt_xent_by_anchors


def nt_xent_of_group(
    z_i: Tensor,
    z_j: Tensor,
    classes: Tensor | None,
    *,
    temperature: float | Tensor,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
    decoupled: bool,
    group: dist.ProcessGroup,
    strategy: Strategy,
    backend: Backend,
) -> NTXentOutput:
    """NT-Xent of all ranks of a group, with checked arguments.

    It is not compiled, because the numbers of pairs of the ranks are known at run time only. With
    classes every rank computes the losses of all pairs.
    """
    tensor, number = checks.split_temperature(temperature)
    overload = distributed_nt_xent.REFERENCE
    if backend != "reference":
        ops.refuse_transforms("nt_xent", (z_i, z_j, tensor))
        overload = dispatch.choose_overload(backend, z_i.device)
    product_dtype = dispatch.product_dtype(z_i)
    of_own_block: Reduction = "none"

    def fits(limit: int) -> bool:
        if decoupled:
            return ops.triangle_saves_at_most(limit, overload, z_i, 2 * z_i.shape[0])
        return ops.saves_at_most(limit, overload, z_i, product_dtype, of_own_block)

    options = Options(
        temperature=number,
        use_cosine_similarity=use_cosine_similarity,
        eps=eps,
        reduction=reduction,
        product_dtype=product_dtype,
        save_for_backward=dispatch.saves_for_backward(fits, z_i, z_j, tensor),
        overload=overload,
        strategy=strategy,
        needs_gradient=torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (z_i, z_j, tensor)),
        decoupled=decoupled,
    )
    z_i, z_j, tensor = (ops.saveable(x) for x in (z_i, z_j, tensor))
    batch = distributed_nt_xent.agree(z_i, tensor, options, group, has_labels=classes is not None)
    if classes is None:
        return distributed_nt_xent.nt_xent(
            z_i, z_j, temperature=tensor, options=options, batch=batch, group=group
        )
    whole = WholeBatch(batch, group, "NT-Xent")
    classes = whole.gather(classes)
    if decoupled:
        check_negatives(len(classes), classes)
    out = nt_xent_by_anchors(
        whole.gather(z_i),
        whole.gather(z_j),
        classes,
        temperature=whole.share(checks.wide(temperature)),
        use_cosine_similarity=use_cosine_similarity,
        eps=eps,
        reduction="none",
        decoupled=decoupled,
        backend=backend,
    )
    losses = whole.own_losses(out.loss, views=2)
    return out._replace(
        loss=whole.reduce(losses, reduction, batch.rows), lse=whole.own_rows(out.lse, views=2)
    )
