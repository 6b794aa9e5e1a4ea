"""SupCon and NT-Xent of labelled rows, against themselves or against reference rows.

Rows of one class are each other's positives. Nothing of the size of the (M, N) similarities is
held: the log-sum-exps come from the operators, SupCon's mean over the positives from the sum of
each class, and NT-Xent's pairs of one class are computed in parts, again in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cjepa_kernels.compat.normalisation import EPS
from cjepa_kernels.definitions import accumulation_dtype
from cjepa_kernels.functional import checks, dispatch
from cjepa_kernels.functional.anchors import add_negatives, gap, softplus
from cjepa_kernels.functional.cross_logsumexp import run_cross_logsumexp
from cjepa_kernels.functional.operands import operand_rows
from cjepa_kernels.functional.self_logsumexp import run_self_logsumexp
from cjepa_kernels.functional.sup_con import sup_con

PAIRS_AT_ONCE = 2**22  # similarities of one part of the pairs of a class


@dataclass(frozen=True)
class Classes:
    """The classes of M rows and of the N rows that they are compared with, on the host.

    Attributes:
        of_rows: (M,) int64 numbers of classes, from 0.
        of_keys: (N,) int64.
        without_own: M = N, and no row is compared with the key of its own number: the keys are the
            rows themselves, or of the same samples.
    """

    of_rows: Tensor
    of_keys: Tensor
    without_own: bool

    @classmethod
    def of(cls, labels: Tensor, key_labels: Tensor | None) -> Classes:
        """Number the labels. Without ``key_labels``, the keys have those of the rows."""
        host = labels.detach().cpu()
        if key_labels is None:
            numbers = torch.unique(host, return_inverse=True)[1]
            return cls(numbers, numbers, without_own=True)
        both = torch.cat([host, key_labels.detach().cpu()])
        numbers = torch.unique(both, return_inverse=True)[1]
        return cls(numbers[: len(host)], numbers[len(host) :], without_own=False)

    @property
    def sizes(self) -> Tensor:
        """(C,) number of keys of each class."""
        count = int(max(self.of_rows.max(), self.of_keys.max())) + 1
        return self.of_keys.bincount(minlength=count)

    @property
    def positives(self) -> Tensor:
        """(M,) number of each row's positives."""
        return self.sizes[self.of_rows] - int(self.without_own)

    @property
    def only_positives(self) -> Tensor:
        """(M,) the only key of the class of each row, or -1 for another number of keys."""
        sizes = self.sizes
        order = self.of_keys.argsort(stable=True)
        first = order[(sizes.cumsum(0) - sizes).clamp(max=len(order) - 1)][self.of_rows]
        return first.where(sizes[self.of_rows] == 1, -1)


class RowSums(NamedTuple):
    """Log-sum-exp of each row, lse = shift / tau + log_sum, and the similarity of its positive."""

    lse: Tensor  # (M,) fp32
    shift: Tensor  # (M,) fp32
    log_sum: Tensor  # (M,) fp32
    positive: Tensor  # (M,) fp32, of rows with exactly one


class LabelledRows:
    """Rows with classes, and the losses between them.

    Args:
        rows: (M, D) checked rows.
        keys: (N, D) checked rows that they are compared with, or None for the rows themselves.
        classes: The classes of both.
        temperature: A checked temperature.
        use_cosine_similarity: Cosine similarity, else the plain dot product.
    """

    def __init__(
        self,
        rows: Tensor,
        keys: Tensor | None,
        classes: Classes,
        *,
        temperature: float | Tensor,
        use_cosine_similarity: bool,
    ) -> None:
        if keys is not None:
            rows, keys = checks.promote(rows, keys)
        self.rows, self.keys, self.classes = rows, keys, classes
        self.tau = checks.as_float_or_scalar(temperature)
        self.options: dict[str, Any] = {
            "use_cosine_similarity": use_cosine_similarity,
            "eps": EPS,
        }

    def sup_con(self) -> Tensor:
        """(M,) losses LSE - (mean similarity of the positives) / tau; 0 without a positive.

        A row with one positive has softplus(LSE- - s / tau), which does not cancel. With n > 1
        positives the loss is not below log n, and is clamped there against rounding.
        """
        if self.keys is None:
            labels = self.classes.of_rows.to(self.rows.device)
            options = {"temperature": self.tau, **self.options}
            return sup_con(self.rows, labels, reduction="none", **options).loss
        # A rectangle leaves one key of each row out of its sum: its own, or else its only positive.
        left_out = self.classes.only_positives
        if self.classes.without_own:
            left_out = torch.arange(len(left_out), device="cpu")
        sums = self._sums(self.keys, positives=left_out.to(self.rows.device))
        rows, keys = self._operands()
        count = self.classes.positives.to(rows.device)
        row_class, key_class = (
            numbers.to(rows.device) for numbers in (self.classes.of_rows, self.classes.of_keys)
        )
        with dispatch.without_autocast(rows.device):
            of_classes = rows.new_zeros(len(self.classes.sizes), rows.shape[1])
            of_classes = of_classes.index_add(0, key_class, keys)  # (C, D)
            total = (rows * of_classes[row_class]).sum(dim=1)
            if self.classes.without_own:
                total = total - (rows * keys).sum(dim=1)
            mean = total / count.clamp(min=1)
            several = gap(sums.lse, mean, sums.shift, sums.log_sum, self.tau)
            bound = count.clamp(min=1).to(several.dtype).log()
            several = several + (several.detach().maximum(bound) - several.detach())
            if not self.classes.without_own:
                one = softplus(gap(sums.lse, sums.positive, sums.shift, sums.log_sum, self.tau))
                several = torch.where(count == 1, one, several)
            return several.where(count > 0, 0.0)

    def nt_xent(self) -> Tensor:
        """Mean over the pairs (a, p) of one class of softplus(LSE_a - s_ap / tau).

        LSE_a is over the rows of other classes.
        """
        count = self.classes.positives
        if self.keys is not None and not self.classes.without_own and count.max() <= 1:
            sums = self._sums(self.keys, positives=self.classes.only_positives.to(self.rows.device))
            chosen = (count == 1).nonzero().squeeze(1).to(self.rows.device)
            with dispatch.without_autocast(self.rows.device):
                lse, shift, log_sum, positive = (x[chosen] for x in sums)
                return softplus(gap(lse, positive, shift, log_sum, self.tau)).mean()
        lse, shift, log_sum, _ = self._other_classes()
        rows, keys = self._operands()
        total = rows.new_zeros(())
        with dispatch.without_autocast(rows.device):
            for row_numbers, key_numbers in pair_blocks(self.classes):
                total = total + checkpoint(
                    _pair_losses,
                    rows,
                    keys,
                    lse,
                    shift,
                    log_sum,
                    self.tau,
                    row_numbers.to(rows.device),
                    key_numbers.to(rows.device),
                    self.classes.without_own,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            return total / int(count.sum())

    def _operands(self) -> tuple[Tensor, Tensor]:
        """Rows and keys, normalised and rounded as the operators do it."""
        rows = operand_rows(self.rows, backend="auto", **self.options)
        if self.keys is None:
            return rows, rows
        return rows, operand_rows(self.keys, backend="auto", **self.options)

    def _sums(self, keys: Tensor, *, positives: Tensor) -> RowSums:
        """Over all keys but ``positives``."""
        out = run_cross_logsumexp(
            self.rows,
            keys,
            positives=positives,
            temperature=self.tau,
            overload=dispatch.choose_overload("auto", self.rows.device),
            **self.options,
        )
        return RowSums(out.row_lse, out.row_shift, out.row_log_sum, out.positive)

    def _other_classes(self) -> RowSums:
        """Over the keys of other classes."""
        if self.keys is None:
            out = run_self_logsumexp(
                self.rows,
                None,
                classes=self.classes.of_rows.to(self.rows.device),
                temperature=self.tau,
                overload=dispatch.choose_overload("auto", self.rows.device),
                **self.options,
            )
            return RowSums(out.lse, out.shift, out.log_sum, out.positive)
        return self._of_keys_of_other_classes(self.keys)

    def _of_keys_of_other_classes(self, keys: Tensor) -> RowSums:
        """One class of rows after the other.

        The keys are sorted by class, so those of other classes lie before and behind.
        """
        row_order, key_order = (
            numbers.argsort(stable=True) for numbers in (self.classes.of_rows, self.classes.of_keys)
        )
        rows, keys = self.rows[row_order.to(keys.device)], keys[key_order.to(keys.device)]
        sizes = self.classes.of_rows.bincount(minlength=len(self.classes.sizes)).tolist()
        parts, row, key = [], 0, 0
        for of_rows, of_keys in zip(sizes, self.classes.sizes.tolist(), strict=True):
            if of_rows > 0:
                part = checkpoint(
                    self._of_two_parts,
                    rows[row : row + of_rows],
                    keys[:key],
                    keys[key + of_keys :],
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                parts.append(part)
            row, key = row + of_rows, key + of_keys
        back = row_order.argsort().to(keys.device)
        lse, shift, log_sum = (torch.cat(columns)[back] for columns in zip(*parts, strict=True))
        return RowSums(lse, shift, log_sum, lse.new_zeros(lse.shape))

    def _of_two_parts(
        self, rows: Tensor, before: Tensor, behind: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``lse``, ``shift`` and ``log_sum`` of rows over the keys of both parts."""
        sums = [
            run_cross_logsumexp(
                rows,
                keys,
                positives=None,
                temperature=self.tau,
                overload=dispatch.choose_overload("auto", rows.device),
                **self.options,
            )
            for keys in (before, behind)
            if len(keys) > 0
        ]
        if not sums:
            nothing = rows.new_full(
                rows.shape[:1], -torch.inf, dtype=accumulation_dtype(rows.dtype)
            )
            return nothing, torch.zeros_like(nothing), nothing
        out = sums[0]
        if len(sums) > 1:
            with dispatch.without_autocast(rows.device):
                out = add_negatives(*sums, features=rows.shape[1], tau=self.tau)
        return out.row_lse, out.row_shift, out.row_log_sum


def pair_blocks(classes: Classes) -> Iterator[tuple[Tensor, Tensor]]:
    """Numbers (G, m) of rows and (G, n) of keys, of one class in each of the G blocks.

    Classes of similar size share a call, and are filled up with -1 to a power of 2. A block of a
    large class holds a part of its rows.
    """
    sizes = classes.sizes
    row_sizes = classes.of_rows.bincount(minlength=len(sizes))
    row_starts, key_starts = row_sizes.cumsum(0) - row_sizes, sizes.cumsum(0) - sizes
    row_order, key_order = (x.argsort(stable=True) for x in (classes.of_rows, classes.of_keys))
    widths = [_next_power_of_2(x) for x in (row_sizes, sizes)]
    has_pairs = (row_sizes > 0) & (sizes > int(classes.without_own))
    shapes = set(zip(*(width[has_pairs].tolist() for width in widths), strict=True))
    for height, width in sorted(shapes):
        chosen = (has_pairs & (widths[0] == height) & (widths[1] == width)).nonzero().squeeze(1)
        rows = _numbers(row_order, row_starts[chosen], row_sizes[chosen], height)
        keys = _numbers(key_order, key_starts[chosen], sizes[chosen], width)
        together = max(1, PAIRS_AT_ONCE // (height * width))
        part = min(height, max(1, PAIRS_AT_ONCE // width))
        for first in range(0, len(chosen), together):
            some_rows, some_keys = (x[first : first + together] for x in (rows, keys))
            for start in range(0, height, part):
                yield some_rows[:, start : start + part], some_keys


def _next_power_of_2(sizes: Tensor) -> Tensor:
    powers = [1 << max(size - 1, 0).bit_length() for size in sizes.tolist()]
    return torch.tensor(powers, device="cpu")


def _numbers(order: Tensor, starts: Tensor, sizes: Tensor, width: int) -> Tensor:
    """(G, width) the members of each class, filled up with -1."""
    place = torch.arange(width, device="cpu")
    numbers = order[(starts[:, None] + place).clamp(max=len(order) - 1)]
    return numbers.masked_fill(place >= sizes[:, None], -1)


def _pair_losses(
    rows: Tensor,
    keys: Tensor,
    lse: Tensor,
    shift: Tensor,
    log_sum: Tensor,
    tau: float | Tensor,
    row_numbers: Tensor,
    key_numbers: Tensor,
    without_own: bool,
) -> Tensor:
    """Sum of the losses of the pairs of blocks (G, m) of rows and (G, n) of keys."""
    a, b = row_numbers.clamp(min=0), key_numbers.clamp(min=0)
    similarity = rows[a] @ keys[b].mT  # (G, m, n)
    is_pair = (row_numbers >= 0)[:, :, None] & (key_numbers >= 0)[:, None, :]
    if without_own:
        is_pair = is_pair & (row_numbers[:, :, None] != key_numbers[:, None, :])
    lse, shift, log_sum = (x[a][:, :, None] for x in (lse, shift, log_sum))
    losses = softplus(gap(lse, similarity, shift, log_sum, tau))
    return losses.masked_fill(~is_pair, 0.0).sum()
