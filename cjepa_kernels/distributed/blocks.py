"""Blocks of S by the operators: a rank's own one, and rectangles against rows of other ranks.

A block gives each row three numbers: shift and log_sum of its log-sum-exp, as the operators save
them, and the similarity of its largest negative. They are in fp64, because the blocks of hundreds
of ranks may be merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cjepa_kernels import ops
from cjepa_kernels.definitions import (
    CrossLogSumExpBackward,
    CrossLogSumExpForward,
    NTXentBackward,
    NTXentForward,
    Reduction,
    SelfLogSumExpBackward,
    SelfLogSumExpForward,
    Strategy,
    accumulation_dtype,
)
from cjepa_kernels.distributed.exchange import count_flops
from cjepa_kernels.reference.rows import positive_temperature, with_rounding


@dataclass(frozen=True)
class Options:
    """The arguments of ``nt_xent`` other than tensors.

    Attributes:
        overload: An overload of the operators, or ``REFERENCE``.
        save_for_backward: Whether the own block saves what its back end can for the backward.
        needs_gradient: Whether there will be a backward.
        decoupled: Leave the positive out of the sum (DCL).
    """

    temperature: float
    use_cosine_similarity: bool
    eps: float
    reduction: Reduction
    product_dtype: torch.dtype | None
    overload: str
    save_for_backward: bool
    needs_gradient: bool
    strategy: Strategy
    decoupled: bool


class OwnBlock(NamedTuple):
    """The block of a rank's own rows."""

    shift: Tensor  # (M_r,), with log_sum LSE- of each row
    log_sum: Tensor  # (M_r,)
    largest_negative: Tensor  # (M_r,)
    positive: Tensor  # (M_r,) similarity of each row and its positive
    saved_for_backward: Tensor


class Blocks:
    """The operators with the arguments that all blocks share. It counts their FLOPs.

    Args:
        options: Options of the loss.
        temperature: () in place of the options' number, or None.
        dtype: Dtype of the features.
    """

    def __init__(self, options: Options, temperature: Tensor | None, dtype: torch.dtype) -> None:
        self.options, self.temperature = options, temperature
        if temperature is not None and temperature.dtype != torch.float64:
            # The parts of its gradient must not be rounded before they are added up.
            self.temperature = temperature.float()
        # A backward takes operands in the accumulation dtype, so that no part of a gradient is
        # rounded.
        self.wide = accumulation_dtype(dtype)
        self.product_dtype = options.product_dtype or (dtype if dtype != self.wide else None)
        self.tau: float | Tensor = options.temperature
        if temperature is not None:
            self.tau = positive_temperature(temperature.double())

    def own(self, z_i: Tensor, z_j: Tensor) -> OwnBlock:
        """The own block: the operator ``nt_xent``, or ``self_logsumexp`` if it is decoupled."""
        options = self.options
        count_flops((2 * len(z_i)) ** 2 * z_i.shape[1])
        arguments: dict[str, Any] = {
            "z_i": z_i,
            "z_j": z_j,
            "temperature_tensor": self.temperature,
            "temperature": options.temperature,
            "use_cosine_similarity": options.use_cosine_similarity,
            "eps": options.eps,
            "product_dtype": options.product_dtype,
            "keep": options.save_for_backward,
        }
        if options.decoupled:
            rows: SelfLogSumExpForward = ops.run(
                "self_logsumexp",
                options.overload,
                positives=None,
                classes=None,
                class_means=None,
                class_weights=None,
                **arguments,
            )
            return OwnBlock(
                shift=rows.shift,
                log_sum=rows.log_sum,
                largest_negative=rows.largest,
                positive=rows.positive,
                saved_for_backward=rows.saved_for_backward,
            )
        out: NTXentForward = ops.run(
            "nt_xent", options.overload, mask=None, reduction="none", **arguments
        )
        return OwnBlock(
            shift=out.shift,
            log_sum=out.log_sum,
            largest_negative=out.largest_negative,
            positive=out.positive,
            saved_for_backward=out.saved_for_backward,
        )

    def own_backward(
        self,
        grad_loss: Tensor,
        z_i: Tensor,
        z_j: Tensor,
        *,
        shift: Tensor,
        log_sum: Tensor,
        positive: Tensor,
        saved_for_backward: Tensor,
    ) -> NTXentBackward:
        """Gradients of the own block.

        Args:
            grad_loss: (M_r,) upstream gradient of each row's loss.
            z_i: (B_r, D) features of the first view.
            z_j: (B_r, D) features of the second view.
            shift: (M_r,) with log_sum LSE- over the negatives of all ranks.
            log_sum: (M_r,).
            positive: (M_r,) similarity of each row and its positive.
            saved_for_backward: As the forward returned them.
        """
        options = self.options
        # Saved bytes are packed rows. Only exponentials need no second computation.
        has_exponentials = saved_for_backward.numel() > 0 and saved_for_backward.is_floating_point()
        count_flops((3 - has_exponentials) * (2 * len(z_i)) ** 2 * z_i.shape[1])
        arguments: dict[str, Any] = {
            "z_i": z_i.to(self.wide),
            "z_j": z_j.to(self.wide),
            "temperature_tensor": self.temperature,
            "shift": shift,
            "log_sum": log_sum,
            "kept": saved_for_backward,
            "temperature": options.temperature,
            "use_cosine_similarity": options.use_cosine_similarity,
            "eps": options.eps,
            "product_dtype": self.product_dtype,
        }
        if options.decoupled:
            return self._decoupled_backward(grad_loss, positive, arguments)
        out: NTXentBackward = ops.run(
            "nt_xent_backward",
            options.overload,
            grad_loss=grad_loss,
            mask=None,
            positive=positive,
            reduction="none",
            **arguments,
        )
        return out

    def _decoupled_backward(
        self, grad_loss: Tensor, positive: Tensor, arguments: dict[str, Any]
    ) -> NTXentBackward:
        """Gradients of the own block with the losses LSE- - s / tau, s of the positive."""
        grad_loss = grad_loss.contiguous()
        out: SelfLogSumExpBackward = ops.run(
            "self_logsumexp_backward",
            self.options.overload,
            grad_lse=grad_loss,
            grad_positive=(-grad_loss / self.tau).to(positive.dtype),
            positives=None,
            classes=None,
            class_weights=None,
            **arguments,
        )
        of_positives = (grad_loss.double() * positive).sum() / self.tau**2
        grad_temperature = out.grad_temperature + of_positives.to(out.grad_temperature.dtype)
        return NTXentBackward(out.grad_z_i, out.grad_z_j, grad_temperature)

    def rectangle(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The negatives that the rows of x and those of y are to each other.

        Returns:
            For x and for y, (n, 3) as of :func:`rows_of`.
        """
        options = self.options
        count_flops(2 * len(x) * len(y) * x.shape[1])
        out: CrossLogSumExpForward = ops.run(
            "cross_logsumexp",
            options.overload,
            x=x,
            y=y,
            positives=None,
            temperature_tensor=self.temperature,
            temperature=options.temperature,
            use_cosine_similarity=options.use_cosine_similarity,
            eps=options.eps,
            product_dtype=options.product_dtype,
            keep=False,
        )
        row_max, column_max = (
            with_rounding(largest, x.shape[1]) for largest in (out.row_max, out.column_max)
        )
        return (
            rows_of(out.row_shift, out.row_log_sum, row_max),
            rows_of(out.column_shift, out.column_log_sum, column_max),
        )

    def paired_rectangle(self, x: Tensor, y: Tensor, positives: Tensor) -> CrossLogSumExpForward:
        """The rectangle of rows that have positives among the columns.

        Args:
            x: (m, D) features.
            y: (n, D) features.
            positives: (m,) int64, the row of y that is each row's positive, -1 for none.
        """
        options = self.options
        count_flops(2 * len(x) * len(y) * x.shape[1])
        out: CrossLogSumExpForward = ops.run(
            "cross_logsumexp",
            options.overload,
            x=x.to(self.wide),
            y=y.to(self.wide),
            positives=positives,
            temperature_tensor=self.temperature,
            temperature=options.temperature,
            use_cosine_similarity=options.use_cosine_similarity,
            eps=options.eps,
            product_dtype=self.product_dtype,
            keep=False,
        )
        return out

    def rectangle_backward(
        self,
        x: Tensor,
        y: Tensor,
        of_rows: Tensor,
        of_columns: Tensor,
        *,
        of_y: bool,
        of_x: bool = True,
        positives: Tensor | None = None,
        grad_positive: Tensor | None = None,
    ) -> CrossLogSumExpBackward:
        """Gradients of x and of y if asked for, and of the temperature.

        Args:
            x: (m, D) features.
            y: (n, D) features.
            of_rows: (m, 3): g r, shift and log_sum of each row of x.
            of_columns: (n, 3): the same of y.
            of_y: Whether to compute the gradient of y.
            of_x: Whether to compute the gradient of x.
            positives: As in :meth:`paired_rectangle`.
            grad_positive: (m,) upstream gradient of the similarities of the positives.
        """
        options = self.options
        count_flops(2 * (1 + of_x + of_y) * len(x) * len(y) * x.shape[1])
        grad_row_lse, row_shift, row_log_sum = of_rows.T.contiguous()
        grad_column_lse, column_shift, column_log_sum = of_columns.T.contiguous()
        out: CrossLogSumExpBackward = ops.run(
            "cross_logsumexp_backward",
            options.overload,
            grad_row_lse=grad_row_lse,
            grad_column_lse=grad_column_lse,
            grad_positive=grad_positive,
            x=x.to(self.wide),
            y=y.to(self.wide),
            positives=positives,
            temperature_tensor=self.temperature,
            row_shift=row_shift,
            row_log_sum=row_log_sum,
            column_shift=column_shift,
            column_log_sum=column_log_sum,
            kept=x.new_empty(0, dtype=self.wide),
            temperature=options.temperature,
            use_cosine_similarity=options.use_cosine_similarity,
            eps=options.eps,
            product_dtype=self.product_dtype,
            of_x=of_x,
            of_y=of_y,
        )
        return out


def rows_of(shift: Tensor, log_sum: Tensor, largest_negative: Tensor) -> Tensor:
    """(n, 3) fp64: shift and log_sum of LSE-, the largest similarity of a negative."""
    return torch.stack([shift, log_sum, largest_negative], dim=1).double()


def merge_rows(a: Tensor, b: Tensor, tau: float | Tensor) -> Tensor:
    """Shift, log_sum and largest negative over the negatives of both blocks; each (n, 3)."""
    # The shift of an empty sum has no meaning.
    shifts = [part[:, 0].masked_fill(part[:, 1] == -torch.inf, -torch.inf) for part in (a, b)]
    shift = torch.maximum(*shifts)
    shift = shift.masked_fill(shift == -torch.inf, 0.0)
    log_sums = [part[:, 1] + (s - shift) / tau for part, s in zip((a, b), shifts, strict=True)]
    largest_negative = torch.maximum(a[:, 2], b[:, 2])
    return torch.stack([shift, torch.logaddexp(*log_sums), largest_negative], dim=1)
