"""Log-sum-exp of each row against the others in pure PyTorch with O(chunk x M) memory.

It serves any device. A chunk of rows at a time is multiplied with all M rows. With N(a) the entries
that count in row a, m_a their largest similarity and p(a) the positive of a,

    S_a     = sum over b in N(a) of exp((s_ab - m_a) / tau),  LSE_a = m_a / tau + log S_a
    dL/dz_a = (1/tau) sum over b in N(a) of
                  [ w_a exp((s_ab - m_a) / tau) + w_b exp((s_ab - m_b) / tau) ] z_b
              + (u_a + u_p(a)) z_p(a),                       w_a = g_a / S_a   (z: unit rows)
    dL/dtau = -(1 / 2 tau) sum_a z_a . dL/dz_a, without the part of the positives

with the upstream gradients g_a of LSE_a and u_a of the positive's similarity.

With class means N(a) also holds the other rows of a's class, and the result is LSE_a minus the mean
of a's logits with these n_a rows. In dL/dz, for two different rows a and b of a class,

    w_a exp((s_ab - m_a) / tau)   becomes   w_a exp((s_ab - m_a) / tau) - g_a / n_a

In a tight class both terms are nearly equal. They are subtracted before the product with the rows,
so the difference keeps its digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cjepa_kernels.chunked.rows import (
    choose_temperature,
    chunk_rows,
    operands,
    project,
    shift_of,
    sum_of,
    take_positives,
)
from cjepa_kernels.definitions import SelfLogSumExpBackward, SelfLogSumExpForward


class _Rows:
    """The M rows of one or two views, and the entries of S that do not count."""

    def __init__(
        self,
        z_i: Tensor,
        z_j: Tensor | None,
        positives: Tensor | None,
        classes: Tensor | None,
        *,
        attract: bool,
    ) -> None:
        self.views = [z_i] if z_j is None else [z_i, z_j]
        self.z = z_i if z_j is None else torch.cat([z_i, z_j])  # (M, D)
        self.positives, self.classes = positives, classes  # (M,) or None
        if z_j is not None:
            batch = len(z_i)
            self.positives = torch.arange(2 * batch, device=z_i.device).roll(batch)
            self.classes = None if classes is None else classes.repeat(2)
        self.attract = attract  # whether rows of one class count, and attract each other

    def exclude(self, tile: Tensor, chunk: slice) -> Tensor | None:
        """Set the entries of a tile that do not count to -inf, in place.

        Args:
            tile: (chunk, M).
            chunk: The rows of S that the tile holds.

        Returns:
            (chunk,) the similarities of the positives, or None if there are none.
        """
        positive = None
        if self.positives is not None:
            positive = take_positives(tile, self.positives[chunk])
        row = torch.arange(len(tile), device=tile.device)
        tile[row, row + chunk.start] = -torch.inf
        if self.classes is not None and not self.attract:
            tile.masked_fill_(self.classes[chunk, None] == self.classes, -torch.inf)
        return positive

    def subtract(self, tile: Tensor, chunk: slice, strength: Tensor) -> None:
        """Subtract a number of each row from its entries of the same class, in place.

        Args:
            tile: (chunk, M) coefficients.
            chunk: The rows of S that the tile holds.
            strength: (M,) the numbers.
        """
        assert self.classes is not None
        same = self.classes[chunk, None] == self.classes
        row = torch.arange(len(tile), device=tile.device)
        same[row, row + chunk.start] = False
        tile.sub_(same * strength[chunk, None])


def forward(
    z_i: Tensor,
    z_j: Tensor | None,
    positives: Tensor | None,
    classes: Tensor | None,
    class_means: Tensor | None,
    class_weights: Tensor | None,
    temperature_tensor: Tensor | None,
    temperature: float,
    use_cosine_similarity: bool,
    eps: float,
    product_dtype: torch.dtype | None,
    save_for_backward: bool,
) -> SelfLogSumExpForward:
    """Log-sum-exps, maxima and the numbers that the backward needs, of ``self_logsumexp``."""
    if save_for_backward:
        raise ValueError("keep must be False: this back end computes the exponentials again")
    with torch.no_grad(), torch.autocast(z_i.device.type, enabled=False):
        rows = _Rows(z_i, z_j, positives, classes, attract=class_weights is not None)
        z = operands(rows.z, use_cosine_similarity, eps, product_dtype)
        tau = choose_temperature(temperature_tensor, temperature)
        positive = z.new_empty(0 if rows.positives is None else len(z))
        largest, total = z.new_empty(len(z)), z.new_empty(len(z))
        step = chunk_rows(len(z))
        buffer = z.new_empty(step, len(z))
        for start in range(0, len(z), step):
            chunk = slice(start, min(start + step, len(z)))
            tile = torch.mm(z[chunk], z.T, out=buffer[: chunk.stop - start])  # (chunk, M)
            of_positives = rows.exclude(tile, chunk)
            if of_positives is not None:
                positive[chunk] = of_positives
            largest[chunk] = tile.amax(dim=1)
            tile.sub_(shift_of(largest[chunk])[:, None]).div_(tau).exp_()
            torch.sum(tile, dim=1, out=total[chunk])
        shift, log_sum = shift_of(largest), total.log()
        above = shift if class_means is None else shift - class_means
        return SelfLogSumExpForward(
            lse=above / tau + log_sum,
            largest=largest,
            shift=shift,
            log_sum=log_sum,
            positive=positive,
            saved_for_backward=z.new_empty(0),
        )


def backward(
    grad_lse: Tensor,
    grad_positive: Tensor | None,
    z_i: Tensor,
    z_j: Tensor | None,
    positives: Tensor | None,
    classes: Tensor | None,
    class_weights: Tensor | None,
    temperature_tensor: Tensor | None,
    shift: Tensor,
    log_sum: Tensor,
    saved_for_backward: Tensor,
    temperature: float,
    use_cosine_similarity: bool,
    eps: float,
    product_dtype: torch.dtype | None,
) -> SelfLogSumExpBackward:
    """Gradients of z_i, z_j and the temperature, of the operator ``self_logsumexp_backward``."""
    with torch.no_grad(), torch.autocast(z_i.device.type, enabled=False):
        rows = _Rows(z_i, z_j, positives, classes, attract=class_weights is not None)
        z = operands(rows.z, use_cosine_similarity, eps, product_dtype)
        tau = choose_temperature(temperature_tensor, temperature)
        weight = grad_lse / sum_of(log_sum)  # (M,), w_a
        strength = None if class_weights is None else grad_lse * class_weights  # (M,), g_a / n_a
        grad = z.new_zeros(z.shape)  # (M, D)
        step = chunk_rows(len(z))
        buffer = z.new_empty(step, len(z))
        for start in range(0, len(z), step):
            chunk = slice(start, min(start + step, len(z)))
            tile = torch.mm(z[chunk], z.T, out=buffer[: chunk.stop - start])
            rows.exclude(tile, chunk)
            tile.sub_(shift[chunk, None]).div_(tau).exp_().mul_(weight[chunk, None])
            if strength is not None:
                rows.subtract(tile, chunk, strength)
            grad[chunk].addmm_(tile, z)
            # The exponents of column b come from the chunk of row b, as in nt_xent.
            grad.addmm_(tile.T, z[chunk])
        grad.div_(tau)
        grad_temperature = (grad * z).sum() / (-2 * tau)
        if rows.positives is not None and grad_positive is not None:
            # Each pair is counted from both of its rows.
            positive = rows.positives.clamp(0, len(z) - 1)
            of_pair = (grad_positive + grad_positive[positive]).masked_fill(
                rows.positives == -1, 0.0
            )
            grad.addcmul_(of_pair[:, None], z[positive])
        if use_cosine_similarity:
            project(grad, rows.z.to(grad.dtype, copy=True), eps)
        like = shift if temperature_tensor is None else temperature_tensor
        batch = len(z_i)
        # Copies: the outputs of an operator must not share memory.
        return SelfLogSumExpBackward(
            grad_z_i=grad[:batch].to(z_i.dtype, copy=True),
            grad_z_j=grad[batch:].to(rows.views[-1].dtype, copy=True),
            grad_temperature=grad_temperature.to(like.dtype),
        )
