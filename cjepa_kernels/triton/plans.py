"""Launch plans: what one call allocated and launched, in the form in which csrc/cuda repeats it.

``csrc/cuda/plan.h`` says what a plan holds. A slot is a piece of memory that a call uses: first its
tensors, in the order of the schema, then its results, then the workspace: all memory that is
neither.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cjepa_kernels.triton.recording import Launch, Recording, is_permanent

ALIGNMENT = 512  # bytes: that of a piece of memory in the workspace, as of PyTorch's allocator
POINTER_ALIGNMENT = 16  # bytes: Triton compiles another kernel for pointers that have it
DTYPES = {  # PyTorch's numbers of them, which csrc hands to the allocator
    torch.uint8: 0,
    torch.int32: 3,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
# By the type of a parameter in Triton's signature: its format for ``struct``.
INTEGERS = {
    **{"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q"},
    **{"u1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"},
}
FLOATS = {"fp32": "f", "fp64": "d"}
POINTER_BYTES, TENSOR_MAP_BYTES = 8, 128
SCRATCH_POINTERS = 2  # that Triton adds to the parameters of each kernel
# Triton numbers the element types of a tensor map in another order than CUDA; see its driver.py.
TENSOR_MAP_DTYPES = {kind: kind for kind in range(16)} | {8: 10, 9: 8, 10: 9}
# Kinds of a parameter, as csrc/cuda/plan.h numbers them.
CONSTANT, POINTER, TENSOR_MAP, NUMBER = range(4)


class NoPlanError(Exception):
    """A call can have no plan; the message says why."""


class Machine(NamedTuple):
    """How a kernel was compiled.

    Attributes:
        function: The driver's handle.
        threads: Threads of a program.
        shared_bytes: Dynamic shared memory of a program.
        signature: Name and type of each parameter, among them the constants.
        tensor_maps: For each descriptor what Triton says of its tensor map.
    """

    function: int
    threads: int
    shared_bytes: int
    signature: dict[str, str]
    tensor_maps: list[dict[str, Any] | None]


def machine(launch: Launch) -> Machine:
    """How Triton compiled the kernel of a launch.

    Raises:
        NoPlanError: A launch needs more than a grid and parameters.
    """
    compiled = launch.compiled
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    metadata = compiled.metadata
    for name in (
        "global_scratch_size",
        "profile_scratch_size",
        "launch_pdl",
        "launch_cooperative_grid",
    ):
        if getattr(metadata, name, 0):
            raise NoPlanError(f"{launch.kernel.__name__} has {name}")
    if metadata.num_ctas != 1:
        raise NoPlanError(f"{launch.kernel.__name__} has clusters")
    return Machine(
        function=compiled.function,
        threads=32 * metadata.num_warps,
        shared_bytes=metadata.shared,
        signature=dict(compiled.src.signature),
        tensor_maps=list(getattr(metadata, "tensordesc_meta", None) or []),
    )


def parameter_sizes(signature: dict[str, str]) -> list[int]:
    """Bytes of each parameter of a kernel: constants have none, and the scratch pointers come last.

    A descriptor of a matrix is its tensor map, then the two sizes and the two strides.
    """
    sizes: list[int] = []
    for kind in signature.values():
        if kind.startswith("tensordesc"):
            sizes += [TENSOR_MAP_BYTES, *(struct.calcsize(code) for code in "iiqq")]
        elif kind.startswith("*"):
            sizes.append(POINTER_BYTES)
        elif kind != "constexpr":
            sizes.append(struct.calcsize({**INTEGERS, **FLOATS}.get(kind, "")))
    return sizes + [POINTER_BYTES] * SCRATCH_POINTERS


class Place(NamedTuple):
    """Where a tensor begins: the slot, and bytes from its start."""

    slot: int
    offset: int


class Span(NamedTuple):
    """Memory of a slot in the recorded call."""

    address: int
    bytes: int
    place: Place

    def holds(self, address: int, size: int) -> bool:
        """Whether so many bytes from an address on lie in it."""
        return self.address <= address and address + size <= self.address + self.bytes


@dataclass
class Memory:
    """The memory of the recorded call, by slots.

    Attributes:
        workspace: The workspace's slot.
        allocated: What the call allocated, by address.
        spans: Which addresses belong to which slot.
        workspace_bytes: Size of the workspace so far.
    """

    workspace: int
    allocated: Mapping[int, Tensor]
    spans: list[Span] = field(default_factory=list)
    workspace_bytes: int = 0

    def find(self, x: Tensor) -> Place:
        """Where a tensor that is not empty begins.

        Memory of the call that is in no slot becomes a part of the workspace.

        Raises:
            NoPlanError: It lies in two slots, partly outside of one, or is not of the call.
        """
        address, size = x.data_ptr(), _bytes_spanned(x)
        # Views that are interleaved overlap, but none of them holds the whole of another one.
        whole = [s for s in self.spans if s.holds(address, size)]
        if not whole:
            if any(s.holds(address, 1) for s in self.spans):
                raise NoPlanError("a tensor of a launch reaches out of its memory")
            storage = x.untyped_storage()
            if storage.data_ptr() not in self.allocated:
                raise NoPlanError("a launch uses memory that the call neither got nor allocated")
            self.add_to_workspace(storage.data_ptr(), storage.nbytes())
            return self.find(x)
        if len(whole) > 1:
            raise NoPlanError("two of the call's tensors share memory")
        (span,) = whole
        return Place(span.place.slot, span.place.offset + address - span.address)

    def add(self, x: Tensor, slot: int) -> None:
        """Make the memory of a tensor that of a slot."""
        if x.numel() > 0:
            self.spans.append(Span(x.data_ptr(), _bytes_spanned(x), Place(slot, 0)))

    def holds(self, address: int) -> bool:
        """Whether an address lies in a slot."""
        return any(span.holds(address, 1) for span in self.spans)

    def add_to_workspace(self, address: int, size: int) -> None:
        """Give memory a place in the workspace, at the same alignment or a better one."""
        if address % POINTER_ALIGNMENT != 0:
            raise NoPlanError("a temporary tensor is not aligned")
        start = -(-self.workspace_bytes // ALIGNMENT) * ALIGNMENT
        self.spans.append(Span(address, size, Place(self.workspace, start)))
        self.workspace_bytes = start + size


def _bytes_spanned(x: Tensor) -> int:
    """Bytes from the first to the last element of a tensor that is not empty."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


def make_plan(
    recording: Recording,
    *,
    tensors: Sequence[Tensor],
    results: Sequence[Tensor | Sequence[Tensor]],
    numbers: dict[str, float],
) -> bytes:
    """The plan of a recorded call.

    Args:
        recording: What the call launched.
        tensors: All tensors of the call, in the order of the schema, without those that are None.
        results: What it returned.
        numbers: The numbers that a later call may give another value, by the name that kernels
            have for them.

    Raises:
        NoPlanError: Its launches alone do not repeat the call.
    """
    if recording.refusal:
        raise NoPlanError(recording.refusal)
    for name, number in numbers.items():
        if math.isnan(number):  # It would be equal to no parameter of a launch.
            raise NoPlanError(f"{name} is NaN")
    lists = [[r] if isinstance(r, Tensor) else list(r) for r in results]
    flat = [x for of_list in lists for x in of_list]
    memory = Memory(len(tensors) + len(flat), recording.allocated)
    for slot, x in enumerate(tensors):
        memory.add(x, slot)
    for slot, x in enumerate(flat, start=len(tensors)):
        if x.numel() > 0 and memory.holds(x.data_ptr()):
            raise NoPlanError("a result shares memory with another one or with an argument")
        if not _is_dense(x):
            raise NoPlanError("a result has gaps in memory")
        memory.add(x, slot)
    for x in recording.zeroed:
        if x.numel() > 0:
            memory.add_to_workspace(x.data_ptr(), _bytes_spanned(x))
    zeroed_bytes = memory.workspace_bytes
    launches = _Launches(memory, numbers)
    packed = [launches.pack(launch, machine(launch)) for launch in recording.launches]
    return b"".join(
        (
            _pack("II", len(tensors), len(numbers)),
            _pack_list(_pack("I", len(of_list)) for of_list in lists),
            _pack_list(_pack_result(x) for x in flat),
            _pack("qQ", memory.workspace_bytes, zeroed_bytes),
            _pack_list(launches.maps),
            _pack_list(packed),
        )
    )


def _is_dense(x: Tensor) -> bool:
    """Whether a tensor takes no more memory than its elements do."""
    return x.numel() == 0 or _bytes_spanned(x) == x.numel() * x.element_size()


class _Launches:
    """Packs launches, and collects their tensor maps."""

    def __init__(self, memory: Memory, numbers: dict[str, float]) -> None:
        self.memory, self.numbers = memory, numbers
        self.index = {name: k for k, name in enumerate(numbers)}
        self.maps: list[bytes] = []

    def pack(self, launch: Launch, compiled: Machine) -> bytes:
        parameters: list[bytes] = []
        tensor_maps = iter(compiled.tensor_maps)

        def add(kind: int, slot: int, value: int) -> None:
            parameters.append(_pack("BIQ", kind, slot, value))

        def add_constant(value: float, code: str) -> None:
            add(CONSTANT, 0, int.from_bytes(struct.pack("<" + code, value), "little"))

        for name, kind in compiled.signature.items():
            if kind == "constexpr":
                continue
            value = launch.arguments[name]
            if kind.startswith("*"):
                if value.numel() == 0:  # No kernel reads it.
                    add(CONSTANT, 0, 0)
                elif is_permanent(value):
                    add(CONSTANT, 0, value.data_ptr())
                else:
                    add(POINTER, *self.memory.find(value))
            elif kind.startswith("tensordesc"):
                add(TENSOR_MAP, self._map(value, next(tensor_maps, None)), 0)
                for size in value.shape:
                    add_constant(int(size), "i")
                for stride in value.strides:
                    add_constant(int(stride), "q")
            elif kind in INTEGERS:
                add_constant(int(value), INTEGERS[kind])
            elif kind == "fp32" and value == self.numbers.get(name):
                add(NUMBER, self.index[name], 0)
            elif kind in FLOATS:
                add_constant(float(value), FLOATS[kind])
            else:
                raise NoPlanError(f"{launch.kernel.__name__} takes {name} of type {kind}")
        for _ in range(SCRATCH_POINTERS):
            add(CONSTANT, 0, 0)
        return b"".join(
            (
                _pack("Q", compiled.function),
                _pack("III", launch.programs, 1, 1),
                _pack("II", compiled.threads, compiled.shared_bytes),
                _pack_list(parameters),
                _pack_list(_pack("I", size) for size in parameter_sizes(compiled.signature)),
            )
        )

    def _map(self, descriptor: Any, meta: dict[str, Any] | None) -> int:
        """The index of a descriptor's tensor map."""
        if meta is None or meta.get("fp4_padded") or len(descriptor.shape) != 2:
            raise NoPlanError("a descriptor is no plain tensor map of a matrix")
        if descriptor.padding != "zero":
            raise NoPlanError("a descriptor pads with something else than zeros")
        place = self.memory.find(descriptor.base)
        packed = b"".join(
            (
                _pack("Iq", *place),
                _pack("ii", TENSOR_MAP_DTYPES[meta["elem_type"]], meta["swizzle"]),
                _pack("QQ", *reversed([int(size) for size in descriptor.shape])),
                _pack("Q", int(descriptor.strides[0]) * meta["elem_size"]),
                _pack("II", *reversed(meta["block_size"])),
            )
        )
        if packed not in self.maps:
            self.maps.append(packed)
        return self.maps.index(packed)


def _pack_result(x: Tensor) -> bytes:
    return b"".join(
        (
            _pack("i", DTYPES[x.dtype]),
            _pack_list(_pack("q", size) for size in x.shape),
            _pack_list(_pack("q", stride) for stride in x.stride()),
        )
    )


def _pack(code: str, *values: Any) -> bytes:
    return struct.pack("<" + code, *values)


def _pack_list(elements: Iterable[bytes]) -> bytes:
    packed = list(elements)
    return _pack("I", len(packed)) + b"".join(packed)
