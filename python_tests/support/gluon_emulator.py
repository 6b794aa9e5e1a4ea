"""Gluon's operations on NumPy arrays, so that the source of a Gluon kernel runs on the CPU.

The parts of a kernel are threads, of which one runs at a time. At each operation on a barrier, a
load or a product, a random number decides which part goes on, and each part has its own odds, so
that some are far ahead of others. What the hardware does in the background happens late and in any
order:

- a load fills its block, and its bytes reach the barrier, at a random later time;
- a product reads its operands when the kernel waits for it.

The emulator stops with an error if a barrier gets too many arrivals, if no part can go on, if a
block is overwritten while a product reads it, if a product reads a block that is being filled, or
if a store is out of bounds or comes twice for one number. Shared memory begins as NaN. The
emulator does not know layouts: which thread holds what is the compiler's affair.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

GLUON = "triton.experimental.gluon"


class EmulationError(AssertionError):
    """A kernel did something that hardware does not allow, or that never ends."""


class Value:
    """A number or an array of a kernel."""

    type = SimpleNamespace(layout="layout")

    def __init__(self, array: Any) -> None:
        self.array = np.asarray(array)

    def to(self, dtype: Any) -> Value:
        if isinstance(dtype, torch.dtype):  # of an operand: rounded, but held in fp32
            return Value(torch.from_numpy(np.asarray(self.array)).to(dtype).float().numpy())
        return Value(self.array.astype(dtype))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.array[index])

    def __bool__(self) -> bool:
        return bool(self.array)

    def __index__(self) -> int:
        return int(self.array)


def plain(x: Any) -> Any:
    """The array of a value, and anything else as it is."""
    return x.array if isinstance(x, Value) else x


def _add_operators() -> None:
    names = ("add", "sub", "mul", "truediv", "floordiv", "mod", "xor", "and", "or")
    for name in (*names, "eq", "ne", "lt", "le", "gt", "ge"):
        function = getattr(operator, f"__{name}__")

        def forward(self: Value, other: Any, function: Callable[..., Any] = function) -> Any:
            if isinstance(other, Pointer):
                return NotImplemented
            return Value(function(self.array, plain(other)))

        def reflected(self: Value, other: Any, function: Callable[..., Any] = function) -> Any:
            return Value(function(plain(other), self.array))

        setattr(Value, f"__{name}__", forward)
        if name in names:
            setattr(Value, f"__r{name}__", reflected)


class Buffer:
    """Memory on the device, and how often each number was written in this launch."""

    def __init__(self, tensor: Tensor) -> None:
        self.is_bf16 = tensor.dtype == torch.bfloat16  # NumPy has no such dtype.
        flat = tensor.view(torch.int16) if self.is_bf16 else tensor
        self.array: np.ndarray = flat.numpy().reshape(-1)
        self.writes = np.zeros(self.array.size, dtype=np.int32)

    def read(self, offsets: np.ndarray) -> np.ndarray:
        numbers = self.array[offsets]
        if self.is_bf16:
            return torch.from_numpy(numbers).view(torch.bfloat16).float().numpy()
        return numbers

    def write(self, offsets: np.ndarray, numbers: np.ndarray) -> None:
        if self.is_bf16:
            rounded = torch.tensor(numbers, dtype=torch.bfloat16)
            numbers = rounded.view(torch.int16).numpy()
        self.array[offsets] = numbers
        np.add.at(self.writes, offsets, 1)
        if offsets.size and self.writes[offsets].max() > 1:
            raise EmulationError("a number has two writers")


class Pointer:
    """An address in a buffer, or an array of them."""

    def __init__(self, buffer: Buffer, offsets: Any = 0) -> None:
        self.buffer, self.offsets = buffer, np.asarray(offsets, dtype=np.int64)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.buffer, self.offsets + plain(other))

    def where(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """The mask in the shape of the offsets, and the offsets that it leaves, all in bounds."""
        chosen = np.broadcast_to(True if mask is None else plain(mask), self.offsets.shape)
        offsets = self.offsets[chosen]
        if offsets.size and (offsets.min() < 0 or offsets.max() >= self.buffer.array.size):
            raise EmulationError("an address is out of bounds")
        return chosen, offsets


_add_operators()


class Block:
    """A block of shared memory; a view of it shares the flags."""

    def __init__(self, array: np.ndarray, flags: SimpleNamespace | None = None) -> None:
        self.array = array
        self.flags = flags or SimpleNamespace(filling=0, readers=0)

    def permute(self, order: Sequence[int]) -> Block:
        return Block(self.array.transpose(order), self.flags)

    def slice(self, start: int, length: int, dim: int = 0) -> Block:
        parts = [slice(None), slice(None)]
        parts[dim] = slice(start, start + length)
        return Block(self.array[tuple(parts)], self.flags)


class SharedMemory:
    """Blocks that ``index`` gives out."""

    def __init__(self, dtype: Any, shape: Sequence[int]) -> None:
        self.dtype = dtype
        self.blocks = [Block(np.full(shape[1:], np.nan, np.float32)) for _ in range(shape[0])]

    def index(self, i: Any) -> Block:
        return self.blocks[int(plain(i))]


class Barrier:
    """A barrier in shared memory: it opens when all arrivals and all bytes have come."""

    def init(self, count: int) -> None:
        self.count = self.pending = count
        self.bytes = 0
        self.opened = 0

    def change(self, arrivals: int = 0, added_bytes: int = 0) -> None:
        self.pending -= arrivals
        self.bytes += added_bytes
        if self.pending < 0:
            raise EmulationError("a barrier got too many arrivals")
        if self.pending == 0 and self.bytes == 0:
            self.pending = self.count
            self.opened += 1

    def has_passed(self, parity: int) -> bool:
        return self.opened % 2 != parity


class Barriers:
    """Barriers that ``index`` gives out."""

    def __init__(self, count: int) -> None:
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, i: Any) -> Barrier:
        return self.barriers[int(plain(i))]


@dataclass
class Descriptor:
    """A matrix from which blocks are loaded; beyond its end they are zeros."""

    matrix: Tensor
    block_shape: tuple[int, int]
    layout: str = "layout"

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype


@dataclass
class Product:
    """A product in flight: what it will read, and what it adds to.

    Attributes:
        x: The left operand, from shared memory or from registers.
        y: The right operand.
        accumulator: What it adds to, perhaps an earlier product.
        adds: Whether it adds.
        result: What it gives, once it has been computed.
    """

    x: Block | Value
    y: Block
    accumulator: Any
    adds: bool
    result: Value | None = None

    @property
    def type(self) -> Any:
        return Value.type

    @property
    def blocks(self) -> list[Block]:
        return [x for x in (self.x, self.y) if isinstance(x, Block)]

    def compute(self) -> None:
        for block in self.blocks:
            if block.flags.filling:
                raise EmulationError("a product reads a block that is being filled")
            block.flags.readers -= 1
        with np.errstate(invalid="ignore"):
            result = self.x.array.astype(np.float64) @ self.y.array.astype(np.float64)
        if self.adds:
            result += plain(finished(self.accumulator))
        self.result = Value(result.astype(np.float32))


def finished(x: Any) -> Any:
    """The result of a product that has been computed, and anything else as it is."""
    return x.result if isinstance(x, Product) and x.result is not None else x


class Scheduler:
    """Runs the parts of one program, one at a time, in an order that a seed determines.

    A part that pauses chooses the one that goes on. A part that ends does so too.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.loads: list[Callable[[], None]] = []
        self.error: BaseException | None = None

    def run(self, parts: Sequence[tuple[Callable[..., None], Sequence[Any]]]) -> None:
        self.turns = [threading.Lock() for _ in parts]
        self.finished = threading.Lock()
        self.waits: list[tuple[Barrier, int] | None] = [None] * len(parts)
        self.alive = [True] * len(parts)
        self.odds = [self.random.random() ** 2 + 0.03 for _ in (*parts, "loads")]
        for lock in (*self.turns, self.finished):
            lock.acquire()
        threads = [
            threading.Thread(target=self._part, args=(number, *part), daemon=True)
            for number, part in enumerate(parts)
        ]
        for thread in threads:
            thread.start()
        self.turns[self._choose()].release()
        self.finished.acquire()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _choose(self) -> int:
        """The part that goes on. Loads arrive meanwhile. After an error, any part that is left."""
        while True:
            ready = [n for n, alive in enumerate(self.alive) if alive and self._can_go_on(n)]
            if self.error is not None:
                return ready[0]
            if self.loads:
                ready.append(len(self.alive))
            if not ready:
                self.error = EmulationError("no part can go on")
                continue
            number = self.random.choices(ready, [self.odds[n] for n in ready])[0]
            if number < len(self.alive):
                return number
            try:
                self.loads.pop(self.random.randrange(min(len(self.loads), 3)))()
            except EmulationError as error:
                self.error = error

    def _can_go_on(self, number: int) -> bool:
        wait = self.waits[number]
        return self.error is not None or wait is None or wait[0].has_passed(wait[1])

    def _part(self, number: int, function: Callable[..., None], args: Sequence[Any]) -> None:
        _LOCAL.number, _LOCAL.products = number, []
        self.turns[number].acquire()
        try:
            if self.error is None:
                function(*args)
                if _LOCAL.products:
                    raise EmulationError("a product is in flight at the end")
        except _StoppedError:
            pass
        except BaseException as error:
            self.error = self.error or error
        self.alive[number] = False
        if any(self.alive):
            self.turns[self._choose()].release()
        else:
            self.finished.release()

    def pause(self, wait: tuple[Barrier, int] | None = None) -> None:
        """Let others go on, until a barrier has passed if one is given."""
        number = _LOCAL.number
        self.waits[number] = wait
        chosen = self._choose()
        if chosen != number:
            self.turns[chosen].release()
            self.turns[number].acquire()
        self.waits[number] = None
        if self.error is not None:
            raise _StoppedError


class _StoppedError(Exception):
    """Another part has failed."""


_LOCAL = threading.local()
_scheduler: Scheduler | None = None
_program = 0


def _running() -> Scheduler:
    assert _scheduler is not None
    return _scheduler


def _wait(barrier: Barrier, parity: Any, pred: Any = True) -> None:
    if plain(pred):
        _running().pause((barrier, int(plain(parity))))


def _arrive(barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
    if plain(pred):
        barrier.change(arrivals=count)
        _running().pause()


def _expect(barrier: Barrier, number: int, pred: Any = True) -> None:
    if plain(pred):
        barrier.change(arrivals=1, added_bytes=number)


def _load_block(
    source: Descriptor, at: Sequence[Any], barrier: Barrier, to: Block, pred: Any = True
) -> None:
    if not plain(pred):
        return
    row, column = (int(plain(x)) for x in at)
    height, width = source.block_shape
    if to.array.shape != (height, width):
        raise EmulationError(f"a block of {source.block_shape} is loaded into {to.array.shape}")
    _check_unread(to)
    to.flags.filling += 1
    to.array[...] = np.nan

    def arrive() -> None:
        _check_unread(to)
        part = source.matrix[row : row + height, column : column + width].float().numpy()
        to.array[...] = 0
        to.array[: part.shape[0], : part.shape[1]] = part
        to.flags.filling -= 1
        barrier.change(added_bytes=-2 * height * width)

    _running().loads.append(arrive)
    _running().pause()


def _check_unread(block: Block) -> None:
    if block.flags.readers:
        raise EmulationError("a block is overwritten while a product reads it")


def _multiply(
    x: Block | Value, y: Block, accumulator: Any, *, use_acc: Any = True, is_async: bool = False
) -> Product:
    assert is_async
    product = Product(x, y, accumulator, bool(plain(use_acc)))
    for block in product.blocks:
        if block.flags.filling:
            raise EmulationError("a product reads a block that is being filled")
        block.flags.readers += 1
    _LOCAL.products.append(product)
    _running().pause()
    return product


def _wait_for_products(pendings: int, deps: Sequence[Any]) -> Any:
    """Compute all products of this part but the last ``pendings`` ones, in order."""
    _running().pause()
    while len(_LOCAL.products) > pendings:
        _LOCAL.products.pop(0).compute()
    found = tuple(finished(x) for x in deps)
    return found[0] if len(found) == 1 else found


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Value:
    chosen, offsets = pointer.where(mask)
    if mask is None:
        return Value(pointer.buffer.read(pointer.offsets))
    numbers = pointer.buffer.read(offsets)
    found = np.full(chosen.shape, other, numbers.dtype)
    found[chosen] = numbers
    return Value(found)


def _store(pointer: Pointer, x: Any, mask: Any = None) -> None:
    chosen, offsets = pointer.where(mask)
    pointer.buffer.write(offsets, np.broadcast_to(plain(x), chosen.shape)[chosen])


def _split(x: Value) -> tuple[Value, Value]:
    return Value(x.array[..., 0]), Value(x.array[..., 1])


def _allocate(dtype: Any, shape: Sequence[int], _: Any) -> SharedMemory | Barriers:
    return Barriers(shape[0]) if dtype is np.int64 else SharedMemory(dtype, shape)


def _specialize(
    parts: Sequence[tuple[Callable[..., None], Sequence[Any]]],
    warps: Sequence[int],
    registers: Sequence[int],
) -> None:
    assert len(parts) == len(warps) + 1 == len(registers) + 1
    _running().run(parts)


def _jit(function: Any = None, **_: Any) -> Any:
    return function if function is not None else lambda f: f


def _language() -> ModuleType:
    gl = ModuleType("language")
    contents = {
        "constexpr": lambda x: x,
        "int64": np.int64,
        "float32": np.float32,
        "float16": torch.float16,
        **{
            f"{name}Layout": lambda *_: "layout"
            for name in ("Slice", "NVMMADistributed", "DistributedLinear", "DotOperand")
        },
        "static_range": range,
        "program_id": lambda _: Value(_program),
        "arange": lambda first, last, layout: Value(np.arange(first, last)),
        "zeros": lambda shape, dtype, layout: Value(np.zeros(shape, dtype)),
        "where": lambda c, a, b: Value(np.where(plain(c), plain(a), plain(b))),
        "exp2": lambda x: Value(np.exp2(x.array)),
        # Without propagate_nan the GPU takes the number beside a NaN.
        "maximum": lambda a, b, propagate_nan=None: Value(
            (np.maximum if propagate_nan else np.fmax)(plain(a), plain(b))
        ),
        "minimum": lambda a, b, propagate_nan=None: Value(
            (np.minimum if propagate_nan else np.fmin)(plain(a), plain(b))
        ),
        "max": lambda x, axis: Value(x.array.max(axis)),
        "sum": lambda x, axis: Value(x.array.sum(axis)),
        "reshape": lambda x, shape: Value(x.array.reshape(shape)),
        "permute": lambda x, order: Value(x.array.transpose(order)),
        "split": _split,
        "convert_layout": lambda x, layout: x,
        "load": _load,
        "store": _store,
        "allocate_shared_memory": _allocate,
        "warp_specialize": _specialize,
    }
    for name, value in contents.items():
        setattr(gl, name, value)
    return gl


def _modules() -> dict[str, ModuleType]:
    """Stand-ins for the modules that a kernel's source imports."""
    gluon, hopper = ModuleType("gluon"), ModuleType("hopper")
    language = _language()
    gluon.jit, gluon.language = _jit, language  # type: ignore[attr-defined]
    hopper.mbarrier = SimpleNamespace(  # type: ignore[attr-defined]
        MBarrierLayout=lambda: "layout",
        init=lambda barrier, count: barrier.init(count),
        expect=_expect,
        wait=_wait,
        arrive=_arrive,
    )
    hopper.tma = SimpleNamespace(async_load=_load_block)  # type: ignore[attr-defined]
    hopper.warpgroup_mma = _multiply  # type: ignore[attr-defined]
    hopper.warpgroup_mma_wait = _wait_for_products  # type: ignore[attr-defined]
    return {
        GLUON: gluon,
        f"{GLUON}.language": language,
        f"{GLUON}.language.nvidia": ModuleType("nvidia"),
        f"{GLUON}.language.nvidia.hopper": hopper,
    }


@contextlib.contextmanager
def _in_place_of(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Inside the context, these modules are imported. Others that are imported there stay."""
    importlib.import_module(GLUON)
    package = sys.modules[GLUON.rpartition(".")[0]]
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    with mock.patch.object(package, "gluon", modules[GLUON]):  # what "from package import" takes
        yield
    for name, module in before.items():
        del sys.modules[name]
        if module is not None:
            sys.modules[name] = module


_names = itertools.count()


def load_kernels(
    path: Path, *replacements: tuple[str, str], imports: Mapping[str, ModuleType] | None = None
) -> ModuleType:
    """The module of a file of Gluon kernels, with the emulator in place of Gluon.

    Args:
        path: The file.
        replacements: Changes of its text, to plant faults: what is replaced, and by what.
        imports: Modules of other kernels that it imports, also made by this function.
    """
    source = path.read_text(encoding="utf-8")
    for old, new in replacements:
        if old not in source:
            raise ValueError(f"{path.name} has no {old!r}")
        source = source.replace(old, new)
    name = f"emulated_kernels_{next(_names)}"
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    with _in_place_of({**_modules(), **(imports or {})}):
        exec(compile(source, str(path), "exec"), module.__dict__)
    for key, value in list(module.__dict__.items()):
        if type(value).__name__ == "constexpr":  # one that a module of Triton's defines
            setattr(module, key, value.value)
    return module


@contextlib.contextmanager
def _scheduled(seed: int, program: int) -> Iterator[None]:
    global _scheduler, _program
    _scheduler, _program = Scheduler(seed), program
    try:
        yield
    finally:
        _scheduler = None


def launch(kernel: Callable[..., None], programs: int, seed: int, **arguments: Any) -> None:
    """Run a kernel on tensors of the CPU, one program after the other.

    Args:
        kernel: A function of a module that ``load_kernels`` made.
        programs: The size of the grid.
        seed: Determines the order in which parts of a program and loads go on.
        arguments: The kernel's, by name. Tensors are written in place.
    """
    buffers = {key: Buffer(x) for key, x in arguments.items() if isinstance(x, Tensor)}
    given = {key: Pointer(buffers[key]) if key in buffers else x for key, x in arguments.items()}
    with np.errstate(invalid="ignore"):
        for program in range(programs):
            with _scheduled(seed + program, program):
                kernel(**given)


def descriptor(matrix: Tensor, rows: int, columns: int) -> Descriptor:
    """What a kernel gets to load (rows, columns) blocks of a matrix."""
    return Descriptor(matrix, (rows, columns))
