"""Blocks of S by the operators: a rank's own one, and rectangles against rows of other ranks.

What a block adds to the log-sum-exp of a row is (shift, log_sum), as the operators save it, with
the row's hardest negative: three numbers a row, in fp64, as hundreds of ranks may add to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cjepa_kernels import ops
from cjepa_kernels.definitions import STRATEGIES, Reduction, Strategy, accumulation_dtype
from cjepa_kernels.distributed.exchange import count_flops
from cjepa_kernels.reference import positive_temperature

__all__ = ["STRATEGIES", "Blocks", "Options", "Strategy", "merge_rows", "rows_of"]


@dataclass(frozen=True)
class Options:
    """What ``nt_xent`` was asked for, besides tensors.

    Attributes:
        overload: Of the operators, or ``REFERENCE``.
        keep: Whether the own block leaves the backward its exponentials.
        needs_gradient: Whether there will be a backward.
    """

    temperature: float
    cosine: bool
    eps: float
    reduction: Reduction
    product_dtype: torch.dtype | None
    overload: str
    keep: bool
    needs_gradient: bool
    strategy: Strategy


class Blocks:
    """The operators with the arguments that all blocks share, counting what they multiply.

    Args:
        options: Of the loss.
        temperature: () in place of the options' number.
        dtype: Of the features.
    """

    def __init__(self, options: Options, temperature: Tensor | None, dtype: torch.dtype) -> None:
        self.options, self.temperature = options, temperature
        if temperature is not None and temperature.dtype != torch.float64:
            # The parts of its gradient are not to be rounded before they are added up.
            self.temperature = temperature.float()
        # Operands are widened for a backward: parts of a gradient are not to be rounded.
        self.wide = accumulation_dtype(dtype)
        self.product_dtype = options.product_dtype or (dtype if dtype != self.wide else None)
        self.tau: float | Tensor = options.temperature
        if temperature is not None:
            self.tau = positive_temperature(temperature.double())

    def own(self, z_i: Tensor, z_j: Tensor) -> tuple[Tensor, ...]:
        """The own block: as ``ops.NT_XENT``, per row."""
        o = self.options
        count_flops((2 * len(z_i)) ** 2 * z_i.shape[1])
        return self._operator("nt_xent")(
            z_i, z_j, None, self.temperature, o.temperature, o.cosine, o.eps, "none",
            o.product_dtype, o.keep,
        )  # fmt: skip

    def own_backward(
        self, grad_loss: Tensor, z_i: Tensor, z_j: Tensor, saved: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Gradients of the own block, with LSE- over all ranks; as ``ops.NT_XENT_BACKWARD``."""
        o, computed_again = self.options, saved[-1].numel() == 0
        count_flops((2 + computed_again) * (2 * len(z_i)) ** 2 * z_i.shape[1])
        return self._operator("nt_xent_backward")(
            grad_loss, z_i.to(self.wide), z_j.to(self.wide), None, self.temperature, *saved,
            o.temperature, o.cosine, o.eps, "none", self.product_dtype,
        )  # fmt: skip

    def rectangle(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the rows of x and those of y add to each other: (n, 3) as of :func:`rows_of`."""
        o = self.options
        count_flops(2 * len(x) * len(y) * x.shape[1])
        out = self._operator("cross_logsumexp")(
            x, y, self.temperature, o.temperature, o.cosine, o.eps, o.product_dtype
        )
        # The positive comes from another product, which may add up in another order: what is
        # within that rounding of it is a tie, and so no hit.
        rounding = torch.finfo(self.wide).eps * x.shape[1] ** 0.5
        hardest = [largest + rounding * largest.abs() for largest in out[2:4]]
        return rows_of(out[4], out[5], hardest[0]), rows_of(out[6], out[7], hardest[1])

    def rectangle_backward(
        self, x: Tensor, y: Tensor, of_rows: Tensor, of_columns: Tensor, *, of_y: bool
    ) -> tuple[Tensor, ...]:
        """Gradients of x, of y if asked for, and of the temperature.

        Args:
            x: (m, D) features.
            y: (n, D) features.
            of_rows: (m, 3): g r, shift and log_sum of each row of x.
            of_columns: (n, 3): the same of y.
            of_y: Whether to compute the gradient of y.
        """
        o = self.options
        count_flops(2 * (2 + of_y) * len(x) * len(y) * x.shape[1])
        rows, columns = of_rows.T.contiguous(), of_columns.T.contiguous()
        return self._operator("cross_logsumexp_backward")(
            rows[0], columns[0], x.to(self.wide), y.to(self.wide), self.temperature,
            rows[1], rows[2], columns[1], columns[2],
            o.temperature, o.cosine, o.eps, self.product_dtype, True, of_y,
        )  # fmt: skip

    def _operator(self, name: str) -> Callable[..., tuple[Tensor, ...]]:
        return ops.operator(name, self.options.overload)  # type: ignore[no-any-return]


def rows_of(shift: Tensor, log_sum: Tensor, hardest: Tensor) -> Tensor:
    """(n, 3) fp64: shift and log_sum of LSE-, the largest similarity of a negative."""
    return torch.stack([shift, log_sum, hardest], dim=1).double()


def merge_rows(a: Tensor, b: Tensor, tau: float | Tensor) -> Tensor:
    """LSE- and hardest negative over the negatives of both; each (n, 3)."""
    # The shift of an empty sum means nothing.
    shifts = [part[:, 0].masked_fill(part[:, 1] == -torch.inf, -torch.inf) for part in (a, b)]
    shift = torch.maximum(*shifts)
    shift = shift.masked_fill(shift == -torch.inf, 0.0)
    log_sums = [part[:, 1] + (s - shift) / tau for part, s in zip((a, b), shifts, strict=True)]
    hardest = torch.maximum(a[:, 2], b[:, 2])
    return torch.stack([shift, torch.logaddexp(*log_sums), hardest], dim=1)
