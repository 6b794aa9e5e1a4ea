"""The losses of ``lightly``: ``from cjepa_kernels.compat.lightly import NTXentLoss``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cjepa_kernels.compat.gathered import gather_rows, own_rows, world_size
from cjepa_kernels.compat.normalisation import EPS, normalised
from cjepa_kernels.compat.representation import shown
from cjepa_kernels.distributed import resolve_group
from cjepa_kernels.functional import checks
from cjepa_kernels.functional.cross_logsumexp import paired_logsumexp
from cjepa_kernels.functional.info_nce import info_nce
from cjepa_kernels.functional.nt_xent import nt_xent

SMALLEST_TEMPERATURE = 1e-8
WeightFunction = Callable[[Tensor, Tensor], Tensor]


class NTXentLoss(nn.Module):
    """``lightly.loss.NTXentLoss``: NT-Xent, and MoCo's loss with a memory bank.

    The arguments, their order and their defaults are those of lightly 1.6.0.

    Args:
        temperature: Float from 1e-8 to 1e30, default 0.5.
        memory_bank_size: (K, D), rows and features of a memory bank, whose rows are then the
            only negatives. Default 0: the negatives are those of the batch.
        gather_distributed: Take the negatives of all ranks, or put the keys of all ranks into the
            bank. Without a process group this is one process.

    Raises:
        ValueError, TypeError: A bad argument; the message names it.

    Source: SimCLR, arXiv 2002.05709; with a bank MoCo, arXiv 1911.05722.

    Example:
        >>> loss_fn = NTXentLoss()
        >>> loss_fn(torch.eye(4), torch.eye(4))
        tensor(0.5944)
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        checks.check_temperature(temperature)
        if not isinstance(temperature, Tensor) and temperature < SMALLEST_TEMPERATURE:
            raise ValueError(
                f"temperature must be at least {SMALLEST_TEMPERATURE}, got {temperature}"
            )
        checks.check_bool("gather_distributed", gather_distributed)
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of a batch of pairs.

        A call puts the rows of ``out1`` into the bank, unless ``out0`` needs no gradient.

        Args:
            out0: (B, D) embeddings of the first view.
            out1: (B, D) embeddings of the second view, or of a momentum encoder.

        Returns:
            () fp32 (fp64 for fp64 embeddings).
        """
        if self.memory_bank.size[0] == 0:
            group = resolve_group(self.gather_distributed)
            # A rank without pairs must not raise here and leave the other ranks waiting.
            _check_pairs(out0, out1, self.temperature, allow_empty=group is not None)
            return nt_xent(out0, out1, temperature=self.temperature, eps=EPS, group=group).loss
        _check_pairs(out0, out1, self.temperature)
        if out0.shape[1] != self.memory_bank.size[1]:
            raise ValueError(
                f"memory_bank_size must be (rows, {out0.shape[1]}) for out0 and out1 of "
                f"{out0.shape[1]} features, got {self.memory_bank.size}"
            )
        bank = self.memory_bank.bank.to(out0, copy=True)  # the backward needs it as it is now
        loss = info_nce(
            out0,
            out1,
            bank,
            temperature=self.temperature,
            in_batch_negatives=False,
            eps=EPS,
        ).loss
        if out0.requires_grad and torch.is_grad_enabled():
            self.memory_bank.push(out1)
        return loss

    @property
    def memory_bank_size(self) -> int | tuple[int, ...]:
        """(K, D), or 0 without a bank."""
        size = self.memory_bank.size
        return size if len(size) > 1 else 0

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        return shown(self, "temperature", "memory_bank_size", "gather_distributed")


class MemoryBank(nn.Module):
    """The bank of :class:`cjepa_kernels.compat.lightly.NTXentLoss`, ``loss_fn.memory_bank``.

    Its buffers are those of lightly's bank. They are no part of a state dict.

    Args:
        size: (K, D), or 0 for no bank.
        gather_distributed: Put the keys of all ranks into the bank.

    Attributes:
        bank: (K, D) unit rows. It begins with random ones.
        bank_ptr: (1,) int64, index of the next row to write.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: int | Sequence[int], gather_distributed: bool = False) -> None:
        super().__init__()
        self.size = _as_shape(size)
        if (self.size != (0,) and len(self.size) != 2) or min(self.size, default=-1) < 0:
            raise ValueError(
                "memory_bank_size must be 0 or (rows, features), two numbers of 0 or more, got "
                f"{size!r}"
            )
        self.gather_distributed = gather_distributed
        rows = normalised(torch.randn(self.size)) if len(self.size) == 2 else torch.empty(0)
        self.register_buffer("bank", rows, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Overwrite the oldest rows with keys (B, D). Keys beyond the end of the bank are dropped.

        The host reads the position, so it waits for the device.
        """
        keys = normalised(keys.detach().to(self.bank.dtype))
        if self.gather_distributed and world_size() > 1:
            keys = gather_rows(keys, with_gradient=False)
        start = int(self.bank_ptr)
        end = min(start + len(keys), len(self.bank))
        self.bank[start:end] = keys[: end - start]
        self.bank_ptr.fill_(end % len(self.bank))

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        return shown(self, "size", "gather_distributed")


class DCLLoss(nn.Module):
    """``lightly.loss.DCLLoss``: NT-Xent without the positive in the denominator.

    The arguments, their order and their defaults are those of lightly 1.6.0.

    Args:
        temperature: Float from 1e-30 to 1e30, default 0.1.
        weight_fn: Takes the two normalised views (B, D) and returns the weights (B,) of the
            positive pairs. It is called a second time with the views swapped. Default: no weights.
        gather_distributed: Take the negatives of all ranks. Without a process group this is one
            process.

    Raises:
        ValueError, TypeError: A bad argument; the message names it.

    Source: Decoupled contrastive learning, arXiv 2110.06848, equation 6.

    Example:
        >>> DCLLoss(temperature=0.5)(torch.eye(4), torch.eye(4))  # log 6 - 2
        tensor(-0.2082)
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: WeightFunction | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        checks.check_temperature(temperature)
        checks.check_bool("gather_distributed", gather_distributed)
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """The loss of a batch of pairs.

        Args:
            out0: (B, D) embeddings of the first view.
            out1: (B, D) embeddings of the second view.

        Returns:
            () fp32 (fp64 for fp64 embeddings). It may be negative.
        """
        of_ranks = self.gather_distributed and world_size() > 1
        unweighted = self.weight_fn is None
        # A rank without pairs must not raise here and leave the other ranks waiting.
        _check_pairs(out0, out1, self.temperature, allow_empty=of_ranks and unweighted)
        if len(out0) == 1 and not of_ranks:
            raise ValueError(
                "out0 and out1 must hold two pairs or more, got one, which has no negatives"
            )
        if unweighted:
            return nt_xent(
                out0,
                out1,
                temperature=self.temperature,
                decoupled=True,
                eps=EPS,
                group=resolve_group(of_ranks),
            ).loss
        return self._of_rectangles(out0, out1, of_ranks=of_ranks)

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        return shown(self, "temperature", "weight_fn", "gather_distributed")

    def _of_rectangles(self, out0: Tensor, out1: Tensor, *, of_ranks: bool) -> Tensor:
        """The loss from the log-sum-exps of each view against each view, with any weights."""
        if of_ranks:
            own = own_rows(out0)
            all0, all1 = (gather_rows(rows, with_gradient=True) for rows in (out0, out1))
        else:
            own = torch.arange(len(out0), device=out0.device)
            all0, all1 = out0, out1
        options: dict[str, Any] = {"temperature": self.temperature, "eps": EPS}
        between = paired_logsumexp(out0, all1, own, **options)
        if of_ranks:
            lse_between = (between.row_lse, paired_logsumexp(out1, all0, own, **options).row_lse)
        else:
            lse_between = (between.row_lse, between.column_lse)
        loss = torch.zeros((), device=out0.device)
        for lse, rows, all_rows, views in zip(
            lse_between, (out0, out1), (all0, all1), ((out0, out1), (out1, out0)), strict=True
        ):
            within = paired_logsumexp(rows, all_rows, own, **options)
            attraction = between.positive / self.temperature  # (B,)
            if self.weight_fn is not None:
                attraction = attraction * self.weight_fn(*map(normalised, views))
            loss = loss + (torch.logaddexp(lse, within.row_lse) - attraction).mean() / 2
        return loss


class DCLWLoss(DCLLoss):
    """``lightly.loss.DCLWLoss``: DCL with von Mises-Fisher weights of the positive pairs.

    The arguments, their order and their defaults are those of lightly 1.6.0.

    Args:
        temperature: Float from 1e-30 to 1e30, default 0.1.
        sigma: Temperature of the weights, default 0.5.
        gather_distributed: Take the negatives of all ranks.

    Raises:
        ValueError, TypeError: A bad argument; the message names it.

    Source: Decoupled contrastive learning, arXiv 2110.06848, section 3.3.

    Example:
        >>> DCLWLoss(temperature=0.5)(torch.eye(4), torch.eye(4))  # all weights are 1
        tensor(-0.2082)
    """

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False
    ) -> None:
        checks.check_in_range("sigma", sigma)
        super().__init__(
            temperature=temperature,
            weight_fn=partial(_mises_fisher_weights, sigma=sigma),
            gather_distributed=gather_distributed,
        )
        self.sigma = sigma

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        return shown(self, "temperature", "sigma", "gather_distributed")


def _check_pairs(
    out0: Tensor, out1: Tensor, temperature: float | Tensor, *, allow_empty: bool = False
) -> None:
    """Raise unless both are (B, D) of the same shape, and on the device of the temperature."""
    checks.check_views(out0, out1, allow_empty=allow_empty, names=("out0", "out1"))
    if out0.ndim != 2:
        raise ValueError(f"out0 and out1 must be (B, D), got {tuple(out0.shape)}")
    checks.check_temperature_device(temperature, "out0", out0)


def _as_shape(size: object) -> tuple[int, ...]:
    """The numbers of ``memory_bank_size``, or none if it holds anything else than integers."""
    try:
        return tuple(map(operator.index, size if isinstance(size, Iterable) else (size,)))
    except TypeError:
        return ()


def _mises_fisher_weights(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """(B,) weights 2 - B softmax(x_k . y_k / sigma), without a gradient."""
    similarity = (x.detach() * y.detach()).sum(dim=1)
    return 2 - len(x) * torch.softmax(similarity / sigma, dim=0)
