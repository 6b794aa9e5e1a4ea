"""Mean similarities within and across classes, in O(M x D) time and memory.

No similarity is computed on its own. With C_k the sum of the n_k rows of class k, T the sum of all
rows and k the class of row a,

    within_a = z_a . (C_k - z_a) / (n_k - 1)
    across   = sum_k C_k . (T - C_k) / (M^2 - sum_k n_k^2)
    dL/dz_a  = w_a (C_k - z_a) + (W_k - w_a z_a),   w_a = g_a / (n_k - 1),   W_k = sum of w_b z_b
                                                    over the rows b of class k

with the upstream gradients g_a of within_a. A few columns of z are taken at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels.chunked.rows import project
from cjepa_kernels.definitions import (
    ClassSimilarityBackward,
    ClassSimilarityForward,
    accumulation_dtype,
)
from cjepa_kernels.reference.rows import round_operands

# A sum runs over at most so many rows of a class, and then over these sums. Few numbers are added
# one after the other, so the rounding errors stay small, and a GPU has enough to do at a time.
BAG_ROWS = 64
CHUNK_ELEMENTS = 2**20


class _Classes:
    """The rows in the order of their classes, in tensors whose sizes depend on M alone.

    The host therefore never waits for a GPU. Classes are numbered in their order; there are at most
    M, and what belongs to the numbers beyond the last class is empty.
    """

    def __init__(self, classes: Tensor) -> None:
        rows = len(classes)
        ordered, self._order = classes.sort(stable=True)
        number = torch.arange(rows + 1, device=classes.device)
        is_first = torch.ones(rows, dtype=torch.bool, device=classes.device)
        is_first[1:] = ordered[1:] != ordered[:-1]
        class_number = is_first.cumsum(0) - 1  # (M,), of the rows in order
        bag = (is_first | (number[:-1] % BAG_ROWS == 0)).cumsum(0) - 1  # (M,)
        starts = torch.searchsorted(class_number, number)  # (M + 1,)
        self._bag_starts = torch.searchsorted(bag, number)  # (M + 1,)
        self._first_bags = torch.cat([bag, bag[-1:] + 1])[starts]  # (M + 1,)
        self._number = number[:-1]
        self.of_row = class_number[torch.searchsorted(ordered, classes)]  # (M,)
        self.sizes = starts.diff()  # (M,), of each class

    def others(self) -> Tensor:
        """(M,) the number of other rows in each row's class."""
        return self.sizes[self.of_row] - 1

    def sums(self, x: Tensor) -> Tensor:
        """(M, columns) the sum of the rows of x in class k as row k."""
        bags = _bag_sums(x, self._order, self._bag_starts)
        return _bag_sums(bags, self._number, self._first_bags)


def _bag_sums(x: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    return F.embedding_bag(order, x, starts, mode="sum", include_last_offset=True)


class _Operands:
    """The rows as the products take them, a few columns at a time."""

    def __init__(
        self,
        z: Tensor,
        *,
        use_cosine_similarity: bool,
        eps: float,
        product_dtype: torch.dtype | None,
        tf32: bool,
    ) -> None:
        self._z, self._tf32 = z, tf32
        self._rounded = product_dtype or z.dtype
        self._dtype = accumulation_dtype(z.dtype)
        # A row is subtracted from the sum of its class, which a large row leaves without digits.
        self._sums_dtype = _widest(z)
        self._norm: Tensor | None = None
        if use_cosine_similarity:
            norm = torch.linalg.vector_norm(z, dim=1, keepdim=True, dtype=self._dtype)
            self._norm = norm.clamp(min=eps)  # (M, 1)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns, and the rows in these columns: (M, columns), of the dtype of the sums."""
        rows, features = self._z.shape
        step = max(1, CHUNK_ELEMENTS // rows)
        for start in range(0, features, step):
            columns = slice(start, min(start + step, features))
            x = self._z[:, columns].to(self._dtype)
            x = x + (x - x) if self._norm is None else x / self._norm  # an infinity becomes NaN
            yield columns, round_operands(x, self._rounded, tf32=self._tf32).to(self._sums_dtype)


def _widest(z: Tensor) -> torch.dtype:
    """fp64, which Apple's GPUs do not have."""
    return torch.float32 if z.device.type == "mps" else torch.float64


def forward(
    z_i: Tensor,
    z_j: Tensor | None,
    classes: Tensor,
    use_cosine_similarity: bool,
    eps: float,
    product_dtype: torch.dtype | None,
    tf32: bool,
) -> ClassSimilarityForward:
    """The means of the operator ``class_similarity``."""
    with torch.no_grad(), torch.autocast(z_i.device.type, enabled=False):
        z = z_i if z_j is None else torch.cat([z_i, z_j])
        groups = _Classes(classes if z_j is None else classes.repeat(2))
        operands = _Operands(
            z,
            use_cosine_similarity=use_cosine_similarity,
            eps=eps,
            product_dtype=product_dtype,
            tf32=tf32,
        )
        dtype = accumulation_dtype(z.dtype)
        wide = _widest(z)  # T - C_k cancels where one class holds most rows
        within = z.new_zeros(len(z), dtype=dtype)
        across = z.new_zeros((), dtype=wide)
        for _, x in operands.chunks():
            sums = groups.sums(x)
            within += sums[groups.of_row].sub_(x).mul_(x).sum(dim=1).to(dtype)
            sums = sums.to(wide)
            across += (sums.sum(dim=0) - sums).mul_(sums).sum()
        others = groups.others()
        pairs = len(z) ** 2 - groups.sizes.square().sum()
        return ClassSimilarityForward(
            within=(within / others).masked_fill(others == 0, 0.0),
            across=(across / pairs).to(dtype),
        )


def backward(
    grad_within: Tensor,
    z_i: Tensor,
    z_j: Tensor | None,
    classes: Tensor,
    use_cosine_similarity: bool,
    eps: float,
    product_dtype: torch.dtype | None,
    tf32: bool,
) -> ClassSimilarityBackward:
    """The gradients of z_i and z_j, of the operator ``class_similarity_backward``."""
    with torch.no_grad(), torch.autocast(z_i.device.type, enabled=False):
        z = z_i if z_j is None else torch.cat([z_i, z_j])
        groups = _Classes(classes if z_j is None else classes.repeat(2))
        operands = _Operands(
            z,
            use_cosine_similarity=use_cosine_similarity,
            eps=eps,
            product_dtype=product_dtype,
            tf32=tf32,
        )
        others = groups.others()
        weight = (grad_within / others).masked_fill(others == 0, 0.0)[:, None]  # (M, 1)
        grad = z.new_empty(z.shape, dtype=accumulation_dtype(z.dtype))
        for columns, x in operands.chunks():
            of_others = groups.sums(x)[groups.of_row].sub_(x).mul_(weight)
            x.mul_(weight)
            of_others.sub_(x).add_(groups.sums(x)[groups.of_row])
            grad[:, columns] = of_others
        if use_cosine_similarity:
            step = max(1, CHUNK_ELEMENTS // z.shape[1])
            for start in range(0, len(z), step):
                rows = slice(start, start + step)
                project(grad[rows], z[rows].to(grad.dtype, copy=True), eps)
        batch = len(z_i)
        # Copies: the results of an operator must not share memory.
        return ClassSimilarityBackward(
            grad_z_i=grad[:batch].to(z.dtype, copy=z_j is not None),
            grad_z_j=grad[batch:].to(z.dtype, copy=True),
        )
