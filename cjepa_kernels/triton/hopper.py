"""The inner tiles by the Gluon kernels for Hopper GPUs, where they serve.

They serve operands of 16 bits with the constant shift and up to 768 features, on GPUs of compute
capability 9.0, for combinations that ``proved.py`` allows. The Triton kernels serve everything
else. Gluon is imported when a kernel of it is first used.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from cjepa_kernels.backends import triton_is_interpreted
from cjepa_kernels.triton import configs, launch, proved, schedules
from cjepa_kernels.triton.configs import TILE, Config
from cjepa_kernels.triton.launch import Panel
from cjepa_kernels.triton.pack import Packed
from cjepa_kernels.triton.recording import keep_forever, run_kernel

if TYPE_CHECKING:
    from cjepa_kernels.triton.tiles import Tiles

ARCHITECTURE = 90  # The kernels use instructions that no other architecture has.
TILE_ROWS = 64
SMALLEST_BLOCKS = 128  # Smaller batches than 128 blocks of rows are launch-bound.
SWIZZLE_BYTES = 128  # of the layout in shared memory: a step has at least this many bytes
REGISTERS = 168  # of a thread when a program starts; the parts then share them out anew
TABLE_BYTES = 64 * 2**20  # Schedules may take this much memory on a device.


@dataclass(frozen=True)
class Table:
    """A schedule on the device.

    Attributes:
        starts: (programs + 1,) int32.
        segments: (fields of a segment * segments,) int32.
        slots: (last column block of the panel,) int32, slots of column sums; 0 before the panel.
            Empty in the backward.
        programs: Number of programs.
    """

    starts: Tensor
    segments: Tensor
    slots: Tensor
    programs: int

    @property
    def bytes(self) -> int:
        return 4 * (self.starts.numel() + self.segments.numel() + self.slots.numel())


class HopperTiles:
    """Launches of one Gluon kernel for the panels of ``Tiles``."""

    def __init__(self, tiles: Tiles, config: Config, tables: dict[Panel, Table]) -> None:
        self.tiles, self.config, self.tables = tiles, config, tables

    def arguments(self, panel: Panel) -> dict[str, Any]:
        """The arguments of the kernel for a panel, by name."""
        tiles, config, table = self.tiles, self.config, self.tables[panel]
        wide = config.kernel == "wide"
        step = tiles.x.padded_features if wide else config.step
        arguments: dict[str, Any] = {
            "stay_blocks": blocks_of(tiles.y.z, TILE, step),
            "row_blocks": blocks_of(tiles.x.z, TILE_ROWS, step),
            "row_sum": tiles.row_sum,
            "row_max": tiles.row_max,
            "column_sum": tiles.column_sum,
            "column_max": tiles.column_max,
            "starts": table.starts,
            "table": table.segments,
            "temperature": tiles.temperature.number,
            "row_pitch": tiles.row_blocks * TILE,
            "column_pitch": panel.blocks * TILE,
            "first_column": panel.first,
            "WIDTH": tiles.x.padded_features,
            "STAGES": config.stages,
            "num_warps": config.warps,
            "maxnreg": REGISTERS,
        }
        return arguments if wide else {**arguments, "STEP": step}

    def launch(self, panel: Panel) -> None:
        """Compute the inner tiles of a panel."""
        kernel = kernel_of(self.config.kernel)
        run_kernel(kernel, self.tables[panel].programs, **self.arguments(panel))

    def compile(self) -> None:
        """Compile the kernel; nothing happens if it is compiled already."""
        kernel = kernel_of(self.config.kernel)
        kernel.warmup(**self.arguments(self.tiles.panels[0]), grid=(1,))


class Numbers(NamedTuple):
    """The numbers of a schedule that are copied to the device; see ``Table``."""

    starts: Sequence[int]
    segments: Sequence[int]
    slots: Sequence[int]

    @property
    def bytes(self) -> int:
        return 4 * sum(map(len, self))


_compiled: set[tuple[Any, ...]] = set()
_failed: set[tuple[Any, ...]] = set()
_tables: dict[tuple[Any, ...], Table | None] = {}  # None: there is none, see ``cached_tables``


def select(tiles: Tiles) -> HopperTiles | None:
    """The launches of a Gluon kernel for these tiles; None if the Triton kernels serve them."""
    config = _config(tiles)
    if config is None:
        return None
    x = tiles.x
    # Very many panels: what ``slots`` takes alone is known before any schedule is made.
    if 4 * sum(panel.last for panel in tiles.panels) > TABLE_BYTES:
        return None
    schedules_of = {panel: _schedule(tiles, panel, config) for panel in tiles.panels}
    tables = cached_tables(x.z.device, dict(schedules_of.values()))
    if tables is None:
        return None
    found = HopperTiles(
        tiles, config, {panel: tables[key] for panel, (key, _) in schedules_of.items()}
    )
    key = (config, x.z.dtype, x.padded_features, x.z.device)
    return found if compiles(key, config.kernel, found.compile) else None


def compiles(key: tuple[Any, ...], name: str, compile_kernel: Callable[[], None]) -> bool:
    """Whether a kernel compiles. The first one that does not is named in a warning.

    Args:
        key: Everything on which the kernel's machine code depends. It is compiled once.
        name: Name of the kernel.
        compile_kernel: Compiles it.
    """
    if key in _failed:
        return False
    if key not in _compiled:
        try:
            compile_kernel()
        except Exception as error:  # Whatever went wrong, the Triton kernels serve.
            _failed.add(key)
            _warn(name, error)
            return False
        _compiled.add(key)
    return True


def _config(tiles: Tiles) -> Config | None:
    """The entry of the table that serves these tiles, if any does and may be used."""
    x = tiles.x
    if (
        not tiles.constant
        or tiles.every_tile_is_masked
        or tiles.row_blocks * tiles.column_blocks < SMALLEST_BLOCKS**2
        or x.planes != 1
        or configs.architecture(x.z.device) != ARCHITECTURE
        or triton_is_interpreted()
    ):
        return None
    allowed = proved.is_allowed(
        "gluon",
        architecture=ARCHITECTURE,
        dtype=x.z.dtype,
        features=x.features,
        operator=tiles.operator,
        direction="forward",
    )
    return _fitting_entry(x) if allowed else None


def _fitting_entry(x: Packed) -> Config | None:
    kernels: tuple[Literal["wide", "pairs"], ...] = ("wide", "pairs")
    for kernel in kernels:
        for entry in configs.entries(kernel, ARCHITECTURE, x.z.dtype, x.padded_features):
            if entry.architecture == ARCHITECTURE and entry.warps > 0 and _fits(entry, x):
                return entry
    return None


def _fits(entry: Config, x: Packed) -> bool:
    """Whether whole steps of a size that the loads can take make up the features."""
    step = x.padded_features if entry.kernel == "wide" else entry.step
    is_power_of_two = step & (step - 1) == 0
    return is_power_of_two and 2 * step >= SWIZZLE_BYTES and x.padded_features % step == 0


def _schedule(
    tiles: Tiles, panel: Panel, config: Config
) -> tuple[tuple[Any, ...], Callable[[], Numbers | None]]:
    """The key of the schedule of a panel, and what makes it."""
    whole_rows, whole_columns = tiles.x.rows // TILE, tiles.y.rows // TILE
    number = programs(tiles.x.z.device)

    def make() -> Numbers | None:
        columns = range(panel.first, min(panel.last, whole_columns))
        heights = [min(c, whole_rows) if tiles.self_contrast else whole_rows for c in columns]
        shape: schedules.Shape = "wide" if config.kernel == "wide" else "pairs"
        schedule = schedules.make(shape, heights, number)
        # The tiles at the edge of a rectangle write the slot behind those of the whole row blocks.
        if max(schedule.slots, default=0) > whole_rows:
            return None
        slots = [0] * panel.first + schedule.slots
        slots += [0] * (panel.last - len(slots))
        return Numbers(schedule.starts, schedule.table, slots)

    key = (config.kernel, panel.first, panel.last, whole_rows, whole_columns, tiles.self_contrast)
    return key, make


def cached_tables(
    device: torch.device, makes: Mapping[tuple[Any, ...], Callable[[], Numbers | None]]
) -> dict[tuple[Any, ...], Table] | None:
    """The schedules of one call on the device, by their keys.

    They are made once. That one of them cannot be made, or that they take too much memory
    together, is remembered too. Then none of them takes any.

    Args:
        device: The device.
        makes: By everything on which a schedule depends, apart from the device: what makes its
            numbers, or None if there is no schedule.

    Returns:
        None also if a CUDA graph is being captured, because a capture cannot copy the schedules. A
        call before it would have made them.
    """
    of_key = {key: (device, *key) for key in makes}
    missing = [key for key in makes if of_key[key] not in _tables]
    if any(where in _tables and _tables[where] is None for where in of_key.values()):
        return None
    if missing and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    room = TABLE_BYTES - sum(table.bytes for table in _tables.values() if table is not None)
    made: dict[tuple[Any, ...], Numbers] = {}
    for key in missing:
        numbers = makes[key]()
        room -= numbers.bytes if numbers is not None else 0
        if numbers is None or room < 0:
            _tables[of_key[key]] = None
            return None
        made[key] = numbers
    _tables.update({of_key[key]: _on_device(device, numbers) for key, numbers in made.items()})
    return {key: table for key, where in of_key.items() if (table := _tables[where]) is not None}


def programs(device: torch.device) -> int:
    """One for each multiprocessor."""
    return launch.processors(device)


def _on_device(device: torch.device, numbers: Numbers) -> Table:
    """Copy a schedule to the device, where it stays.

    A stream of its own keeps the copy out of the memory of a CUDA graph that is being prepared.
    Such memory is used again for other tensors, and the schedule has to outlive the graph.
    """

    def copy(of_one: Sequence[int]) -> Tensor:
        return keep_forever(torch.tensor(of_one, dtype=torch.int32, device=device))

    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with torch.cuda.stream(stream):
        table = Table(
            starts=copy(numbers.starts),
            segments=copy(numbers.segments),
            slots=copy(numbers.slots),
            programs=len(numbers.starts) - 1,
        )
    if stream is not None:
        stream.synchronize()
    return table


FILES = {  # of kernels/, by the names that ``configs.py`` has for the kernels
    "wide": "hopper",
    "pairs": "hopper",
    "hopper_owned": "hopper_owned",
    "hopper_strips": "hopper_squares",
    "hopper_tiles": "hopper_squares",
    "hopper_products": "hopper_squares",
}


def kernel_of(name: str) -> Any:
    """A Gluon kernel. Its file imports Gluon."""
    module = importlib.import_module(f"cjepa_kernels.triton.kernels.{FILES[name]}")
    return getattr(module, f"{name}_kernel")


@lru_cache
def _layout() -> Any:
    """How a block lies in shared memory: as the tensor cores read it, numbers of 16 bits."""
    gl = importlib.import_module("triton.experimental.gluon.language")
    return gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE_BYTES, element_bitwidth=16, rank=2)


def blocks_of(matrix: Tensor, rows: int, columns: int) -> Any:
    """The argument from which a kernel loads (rows, columns) blocks of a matrix."""
    module = importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    return module.TensorDescriptor.from_tensor(matrix, [rows, columns], _layout())


_warned = False


def _warn(name: str, error: Exception) -> None:
    """Warn once that the Triton kernels run in place of a Gluon kernel."""
    global _warned
    if _warned:
        return
    _warned = True
    lines = str(error).splitlines() or [""]
    warnings.warn(
        f"the Gluon kernel {name} could not be compiled ({type(error).__name__}: "
        f"{lines[0][:200]}), so the Triton kernels run in its place; CJEPA_GLUON=0 in the "
        "environment silences this warning",
        UserWarning,
        stacklevel=2,
    )
