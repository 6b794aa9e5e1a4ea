"""A queue of keys, whose rows are the negatives of a contrastive loss."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cjepa_kernels.definitions import FLOATING
from cjepa_kernels.distributed import resolve_group
from cjepa_kernels.distributed.gather import gather_keys
from cjepa_kernels.functional.checks import check_bool, check_floating_tensor
from cjepa_kernels.modules.distributed_attribute import distributed_attribute


class MomentumQueue(nn.Module):
    """First-in, first-out queue of keys, for the ``negatives`` of :class:`InfoNCELoss`.

    The queue stores keys as they come, because the losses normalise the rows of both sides
    themselves. It has no parameters, and its keys never get a gradient. The state dict holds them,
    so that a resumed run continues with the same negatives.

    Args:
        size: K, the largest number of keys, at least 1.
        features: D, the number of features of a key, at least 1.
        random_start: Begin with K random unit rows instead of an empty queue, as MoCo, solo-learn
            and lightly do. Random rows are easy negatives, which the first K keys replace.
        distributed: Enqueue the keys of all ranks (True), or of those of a process group, in the
            order of the ranks, so that the queues of all ranks stay alike. Every rank has to take
            part in every :meth:`enqueue`, and may bring another number of keys. Without a call of
            ``init_process_group``, True means one process. Otherwise each rank has a queue of its
            own keys, and DDP must not broadcast its buffers (``broadcast_buffers=False``). Random
            rows differ between ranks unless their seeds agree or DDP broadcasts the buffers.
        device: Device of the keys. Default: PyTorch's default device.
        dtype: Dtype of the stored keys: fp64, fp32, bf16 or fp16. Half precision halves the memory.
            Default: PyTorch's default dtype.

    Raises:
        ValueError, TypeError: A bad argument; the message names it.

    Source: MoCo, arXiv 1911.05722, section 3.2.

    Example:
        >>> from cjepa_kernels import InfoNCELoss
        >>> queue = MomentumQueue(size=4096, features=16)
        >>> loss_fn = InfoNCELoss(in_batch_negatives=False)
        >>> for _ in range(3):
        ...     query, key = torch.randn(2, 8, 16)
        ...     out = loss_fn(query, key, queue.negatives())
        ...     queue.enqueue(key)
        >>> queue.filled
        24
    """

    distributed: bool | ProcessGroup = distributed_attribute(
        "Whether the keys of all ranks are enqueued, or the process group whose keys are."
    )
    keys: Tensor  # (K, D)
    # (2,) int64: the row that the next key replaces, and the number of rows that hold a key. The
    # host has both numbers in attributes as well, and so never waits for a GPU to read them.
    counters: Tensor

    def __init__(
        self,
        size: int,
        features: int,
        *,
        random_start: bool = False,
        distributed: bool | ProcessGroup = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, number in (("size", size), ("features", features)):
            if isinstance(number, bool) or not isinstance(number, Integral):
                raise TypeError(f"{name} must be an int, got {number!r}")
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        check_bool("random_start", random_start)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in FLOATING:
            raise ValueError(f"dtype must be fp64, fp32, bf16 or fp16, got {dtype}")
        size, features = int(size), int(features)
        self.size, self.features = size, features
        self.random_start = random_start
        self.distributed = distributed
        self.register_buffer("keys", torch.empty(size, features, device=device, dtype=dtype))
        self.register_buffer("counters", torch.empty(2, device=device, dtype=torch.int64))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Begin again: without keys, or with other random ones with ``random_start``."""
        self.keys.zero_()
        if self.random_start:
            rows = torch.randn_like(
                self.keys, dtype=torch.promote_types(self.keys.dtype, torch.float)
            )
            self.keys.copy_(nn.functional.normalize(rows, dim=1))
        self._count(0, self.size if self.random_start else 0)

    def reset_parameters(self) -> None:
        """As :meth:`reset`, under the name that PyTorch calls after ``to_empty``."""
        self.reset()

    @property
    def filled(self) -> int:
        """Number of rows that hold a key, from 0 to ``size``."""
        return self._filled

    def negatives(self) -> Tensor:
        """The keys of the queue, as ``negatives`` of a loss.

        They are a copy, so :meth:`enqueue` may run before the backward. torch.compile breaks its
        graph here and in :meth:`enqueue`.

        Returns:
            (n, D) with n = :attr:`filled`, in no particular order; of the queue's dtype.
        """
        return _eagerly(self._negatives)()  # type: ignore[no-any-return]

    def enqueue(self, keys: Tensor) -> None:
        """Add keys; each one replaces the oldest key of a full queue.

        Args:
            keys: (N, D), N >= 1, on the queue's device and of any floating-point dtype. Of more
                keys than the queue has rows, the last ones stay.

        Raises:
            TypeError: Keys of the wrong kind or dtype.
            ValueError: A wrong shape or device. With ``distributed`` also, on all ranks alike, a
                rank without keys, or one whose queue differs in size, dtype or position.
            RuntimeError: A rank ended, or did not take part within the process group's timeout.
        """
        _eagerly(self._enqueue)(keys)

    def _negatives(self) -> Tensor:
        return self.keys[: self._filled].clone()

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        check_floating_tensor("keys", keys)
        if keys.ndim != 2:
            raise ValueError(f"keys must be (N, {self.features}), got {tuple(keys.shape)}")
        if keys.device != self.keys.device:
            raise ValueError(
                f"keys must be on the device of the queue, {self.keys.device}, got {keys.device}"
            )
        group = resolve_group(self.distributed)
        if group is not None:
            keys = gather_keys(keys.to(self.keys.dtype), self._settings(), group)
        if len(keys) == 0 or keys.shape[1] != self.features:
            raise ValueError(
                f"keys must be (N, {self.features}) with at least one row, got {tuple(keys.shape)}"
            )
        keys = keys[-self.size :]
        start = self._position
        first = min(len(keys), self.size - start)  # the others begin again at row 0
        self.keys[start : start + first] = keys[:first]
        self.keys[: len(keys) - first] = keys[first:]
        self._count((start + len(keys)) % self.size, min(self._filled + len(keys), self.size))

    def _settings(self) -> dict[str, Any]:
        """What must be the same on every rank."""
        return {
            "the queue's size": self.size,
            "the queue's number of features": self.features,
            "the queue's position": self._position,
            "the number of keys in the queue": self._filled,
        }

    def _count(self, position: int, filled: int) -> None:
        self._position, self._filled = position, filled
        self.counters[0], self.counters[1] = position, filled

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        keys, counters = (state_dict.get(f"{prefix}{name}") for name in ("keys", "counters"))
        position, filled = self._position, self._filled
        fits = not isinstance(keys, Tensor) or keys.shape == self.keys.shape  # else PyTorch says so
        if (
            fits
            and isinstance(counters, Tensor)
            and counters.shape == (2,)
            and not counters.is_meta
        ):
            position, filled = (int(number) for number in counters.tolist())
            # A queue that is not full has its keys in the rows before its position.
            full = filled == self.size and 0 <= position < self.size
            if not (full or 0 <= filled == position < self.size):
                error_msgs.append(
                    f"{prefix}counters must hold a position and a number of keys that is the same "
                    f"or {self.size}, both from 0, got {position} and {filled}"
                )
                return
        errors = len(error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if len(error_msgs) == errors:
            self._position, self._filled = position, filled
        else:  # PyTorch has taken what fits all the same
            self._count(self._position, self._filled)

    def extra_repr(self) -> str:
        """Settings as ``name=value``, for ``print(module)``."""
        return (
            f"{self.size}, {self.features}, filled={self._filled}, "
            f"random_start={self.random_start}, dtype={self.keys.dtype}"
        )


def _eagerly(function: Any) -> Any:
    """A function that torch.compile does not trace: the numbers of keys change with every step."""
    # Without the condition disable() would import the compiler, which takes as long as torch.
    if torch.compiler.is_compiling():
        return torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return function
