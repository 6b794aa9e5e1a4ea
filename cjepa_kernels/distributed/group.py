"""The ranks of a group: the pairs of each rank, and the check that all options agree."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cjepa_kernels.definitions import FLOATING, REDUCTIONS, Reduction
from cjepa_kernels.distributed.exchange import Exchange

REFUSED = -1  # in place of a number of rows
YES_OR_NO = (False, True)


def resolve_group(distributed: bool | dist.ProcessGroup) -> dist.ProcessGroup | None:
    """The process group of ``distributed=True`` (all ranks), of a group (itself), or None.

    Without a call of ``init_process_group``, ``True`` gives None as well: one process.

    Raises:
        TypeError: Neither a bool nor a process group.
    """
    if isinstance(distributed, bool):
        together = distributed and dist.is_available() and dist.is_initialized()
        return dist.group.WORLD if together else None
    if not (dist.is_available() and isinstance(distributed, dist.ProcessGroup)):
        raise TypeError(
            f"distributed must be a bool or a process group, got {type(distributed).__name__}"
        )
    return distributed


class SharedGroup:
    """A process group as a module holds it, so that the module can be copied and pickled.

    A group belongs to the processes of one run: a deep copy shares it, and a pickle can only name
    the default group, which every run has, as ``True``.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGroup:
        return self

    def __reduce__(self) -> tuple[type[bool], tuple[bool]]:
        if dist.is_initialized() and self.group is dist.group.WORLD:
            return bool, (True,)
        raise TypeError(
            "a module whose distributed is a process group other than the default one cannot be "
            "pickled, because the group exists in this run only: save its state_dict, or set "
            "distributed to True or False before"
        )


@dataclass(frozen=True)
class GlobalBatch:
    """The numbers of pairs of all ranks, in the order of the ranks.

    Attributes:
        rank: This rank.
        batches: Number of pairs of each rank.
    """

    rank: int
    batches: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """R, the number of ranks."""
        return len(self.batches)

    @property
    def rows(self) -> int:
        """M, the rows of both views of all pairs."""
        return 2 * sum(self.batches)

    @property
    def own(self) -> slice:
        """Where this rank's pairs are among those of all ranks."""
        first = sum(self.batches[: self.rank])
        return slice(first, first + self.batches[self.rank])

    def rows_of(self, rank: int) -> int:
        """M_r, the rows of both views of one rank's pairs."""
        return 2 * self.batches[rank]


@dataclass(frozen=True)
class Setting:
    """An option that must be the same on every rank: a number, or one of some values.

    Attributes:
        name: The name that an error shows.
        value: The value on this rank.
        known: The possible values, or None for a number.
    """

    name: str
    value: Any
    known: Sequence[Any] | None = None

    def encode(self) -> int:
        """The value as an integer of 64 bits."""
        if self.known is not None:
            return list(self.known).index(self.value)
        code: int = struct.unpack("q", struct.pack("d", float(self.value)))[0]
        return code

    def decode(self, code: int) -> Any:
        """The value of any rank, from its integer."""
        if self.known is not None:
            return self.known[code]
        number: float = struct.unpack("d", struct.pack("q", code))[0]
        return int(number) if isinstance(self.value, int) and number.is_integer() else number


def agree(
    z_i: Tensor,
    settings: Sequence[Setting],
    group: dist.ProcessGroup,
    *,
    row: str = "pair",
    of: str = "NT-Xent",
) -> GlobalBatch:
    """Exchange the numbers of pairs, and check that all ranks have the same options.

    Args:
        z_i: (B_r, D) first views of this rank.
        settings: The same names on every rank.
        group: The ranks.
        row: What a row is, for an error.
        of: What the ranks do together, for an error.

    Raises:
        ValueError: On all ranks alike, if a rank has no pair or another value of an option; the
            message names the rank. Also if a rank refused its arguments.
    """
    features = Setting("the number of features", z_i.shape[1])
    everything = [features, *settings]
    own = [len(z_i), *(setting.encode() for setting in everything)]
    exchange = Exchange(group, of=of)
    described = exchange.numbers(own, z_i.device)
    check_refusals([batch for batch, *_ in described])
    for rank, (batch, *_) in enumerate(described):
        if batch == 0:
            raise ValueError(f"every rank must hold at least one {row}, rank {rank} has none")
    check_settings(everything, [codes for _, *codes in described])
    return GlobalBatch(exchange.rank, tuple(batch for batch, *_ in described))


def refuse(
    device: torch.device, group: dist.ProcessGroup, *, settings: int, of: str = "NT-Xent"
) -> None:
    """Tell the other ranks, which are in :func:`agree`, that this rank refuses its arguments.

    Args:
        device: Device of this rank's rows.
        group: The ranks.
        settings: How many settings the ranks compare.
        of: What the ranks do together, for an error.
    """
    Exchange(group, of=of).numbers([REFUSED] * (2 + settings), device)


def check_refusals(rows: Sequence[int]) -> None:
    """Raise if a rank gave ``REFUSED`` in place of its number of rows."""
    if REFUSED in rows:
        raise ValueError(
            "every rank must be called with arguments that it accepts, rank "
            f"{rows.index(REFUSED)} raised an error for its own: see the error of that rank"
        )


def shared_settings(
    names: str,
    z: Tensor,
    *,
    temperature: float | Tensor,
    product_dtype: torch.dtype | None,
    is_reference: bool,
    needs_gradient: bool,
    use_cosine_similarity: bool,
    eps: float,
    reduction: Reduction,
) -> list[Setting]:
    """The nine settings that NT-Xent and SupCon have in common.

    Args:
        names: The features' names, for an error.
        z: Features of this rank.
        temperature: A number, or a 0-dim tensor.
        product_dtype: The dtype to which autocast rounds the operands of the product.
        is_reference: Whether the back end is the reference.
        needs_gradient: Whether the features or the temperature need a gradient.
        use_cosine_similarity: Cosine similarity, else the dot product.
        eps: Lower bound on the norm used for normalisation.
        reduction: ``mean``, ``sum`` or ``none``.
    """
    number = 0.0  # on a device other than the CPU the host would wait for it
    if not isinstance(temperature, Tensor):
        number = temperature
    elif temperature.device.type == "cpu":
        number = temperature.item()
    of_tensor = isinstance(temperature, Tensor)
    return [
        Setting(f"the dtype of {names.replace(',', ' and')}", z.dtype, FLOATING),
        Setting("autocast's dtype", product_dtype, (None, *FLOATING)),
        Setting("whether backend is the reference", is_reference, YES_OR_NO),
        Setting(f"requires_grad of {names} or temperature", needs_gradient, YES_OR_NO),
        Setting("whether temperature is a tensor", of_tensor, YES_OR_NO),
        Setting("temperature", number),
        Setting("use_cosine_similarity", use_cosine_similarity, YES_OR_NO),
        Setting("eps", eps),
        Setting("reduction", reduction, REDUCTIONS),
    ]


def check_settings(settings: Sequence[Setting], codes: Sequence[Sequence[int]]) -> None:
    """Raise unless every rank has the same settings.

    Args:
        settings: Those of this rank.
        codes: Of each rank, its settings as integers.
    """
    for position, setting in enumerate(settings):
        first = codes[0][position]
        for rank, own in enumerate(codes):
            if own[position] != first:
                raise ValueError(
                    f"{setting.name} must be the same on every rank, rank 0 has "
                    f"{setting.decode(first)} and rank {rank} has {setting.decode(own[position])}"
                )
