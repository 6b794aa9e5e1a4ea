"""The inner tiles by the Gluon kernels for Hopper GPUs, where they serve.

They serve operands of 16 bits with the constant shift and up to 768 features, on GPUs of compute
capability 9.0, for combinations that ``proved.py`` allows. The Triton kernels serve everything
else. Gluon is imported when a kernel of it is first used.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

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
        segments: (5 segments,) int32.
        slots: (last column block of the panel,) int32, slots of column sums; 0 before the panel.
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
            "stay_blocks": _blocks_of(tiles.y.z, TILE, step),
            "row_blocks": _blocks_of(tiles.x.z, TILE_ROWS, step),
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
        kernel = _kernel(self.config.kernel)
        run_kernel(kernel, self.tables[panel].programs, **self.arguments(panel))

    def compile(self) -> None:
        """Compile the kernel; nothing happens if it is compiled already."""
        kernel = _kernel(self.config.kernel)
        kernel.warmup(**self.arguments(self.tiles.panels[0]), grid=(1,))


_compiled: set[tuple[Any, ...]] = set()
_failed: set[tuple[Any, ...]] = set()
_tables: dict[tuple[Any, ...], Table] = {}


def select(tiles: Tiles) -> HopperTiles | None:
    """The launches of a Gluon kernel for these tiles; None if the Triton kernels serve them."""
    config = _config(tiles)
    if config is None:
        return None
    x = tiles.x
    key = (config, x.z.dtype, x.padded_features, x.z.device)
    if key in _failed:
        return None
    tables = {}
    for panel in tiles.panels:
        table = _table(tiles, panel, config)
        if table is None:
            return None
        tables[panel] = table
    found = HopperTiles(tiles, config, tables)
    if key not in _compiled:
        try:
            found.compile()
        except Exception as error:  # Whatever went wrong, the Triton kernels serve.
            _failed.add(key)
            _warn(config, error)
            return None
        _compiled.add(key)
    return found


def _config(tiles: Tiles) -> Config | None:
    """The entry of the table that serves these tiles, if any does and may be used."""
    x, y = tiles.x, tiles.y
    if (
        not tiles.constant
        or tiles.mask is not None
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
        operator="nt_xent" if x is y else "cross_logsumexp",
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


def _table(tiles: Tiles, panel: Panel, config: Config) -> Table | None:
    """The schedule of a panel on the device; None if there is no room for it."""
    device = tiles.x.z.device
    whole_rows, whole_columns = tiles.x.rows // TILE, tiles.y.rows // TILE
    key = (config.kernel, device, panel.first, panel.last, whole_rows, whole_columns,
           tiles.self_contrast)  # fmt: skip
    if key in _tables:
        return _tables[key]
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None  # A capture cannot copy the schedule. A call before it would have made it.
    columns = range(panel.first, min(panel.last, whole_columns))
    heights = [min(c, whole_rows) if tiles.self_contrast else whole_rows for c in columns]
    shape: schedules.Shape = "wide" if config.kernel == "wide" else "pairs"
    schedule = schedules.make(shape, heights, programs(device))
    # The tiles at the edge of a rectangle write the slot behind those of the whole row blocks.
    if max(schedule.slots, default=0) > whole_rows:
        return None
    slots = [0] * panel.first + schedule.slots
    slots += [0] * (panel.last - len(slots))
    table = _on_device(device, schedule, slots)
    if sum(one.bytes for one in _tables.values()) + table.bytes > TABLE_BYTES:
        return None
    _tables[key] = table
    return table


def programs(device: torch.device) -> int:
    """One for each multiprocessor."""
    return launch.processors(device)


def _on_device(device: torch.device, schedule: schedules.Schedule, slots: list[int]) -> Table:
    """Copy a schedule to the device, where it stays.

    A stream of its own keeps the copy out of the memory of a CUDA graph that is being prepared.
    Such memory is used again for other tensors, and the schedule has to outlive the graph.
    """

    def copy(numbers: list[int]) -> Tensor:
        return keep_forever(torch.tensor(numbers, dtype=torch.int32, device=device))

    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    with torch.cuda.stream(stream):
        table = Table(
            starts=copy(schedule.starts),
            segments=copy(schedule.table),
            slots=copy(slots),
            programs=len(schedule.programs),
        )
    if stream is not None:
        stream.synchronize()
    return table


def _kernel(name: str) -> Any:
    """A kernel of ``kernels/hopper.py``, which imports Gluon."""
    module = importlib.import_module("cjepa_kernels.triton.kernels.hopper")
    return getattr(module, f"{name}_kernel")


@lru_cache
def _layout() -> Any:
    """How a block lies in shared memory: as the tensor cores read it, numbers of 16 bits."""
    gl = importlib.import_module("triton.experimental.gluon.language")
    return gl.NVMMASharedLayout(swizzle_byte_width=SWIZZLE_BYTES, element_bitwidth=16, rank=2)


def _blocks_of(matrix: Tensor, rows: int, columns: int) -> Any:
    """The argument from which a kernel loads (rows, columns) blocks of a matrix."""
    module = importlib.import_module("triton.experimental.gluon.nvidia.hopper")
    return module.TensorDescriptor.from_tensor(matrix, [rows, columns], _layout())


_warned = False


def _warn(config: Config, error: Exception) -> None:
    """Warn once that the Triton kernels run in place of a Gluon kernel."""
    global _warned
    if _warned:
        return
    _warned = True
    lines = str(error).splitlines() or [""]
    warnings.warn(
        f"the Gluon kernel {config.kernel} could not be compiled ({type(error).__name__}: "
        f"{lines[0][:200]}), so the Triton kernels run in its place; CJEPA_GLUON=0 in the "
        "environment silences this warning",
        UserWarning,
        stacklevel=2,
    )
