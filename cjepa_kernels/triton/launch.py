"""How a problem is cut into launches: dtypes of operands, sizes of tiles, panels of columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cjepa_kernels.environment import DEFAULT_WORKSPACE_MEBIBYTES, read_mebibytes
from cjepa_kernels.triton import configs
from cjepa_kernels.triton.configs import TILE, Config, Kernel
from cjepa_kernels.triton.operands import depth_block, planes_of, rounded_dtype
from cjepa_kernels.triton.pack import Packed, Upstream, pack

# Up to this many blocks a side, one launch takes all tiles and gives each a mask.
ONE_LAUNCH_BLOCKS = 16
GROUP = 8  # blocks of the side of the squares in which programs take tiles
REDUCTION_ROWS = 32  # rows for each program of the reduction: a small batch has enough programs
SLOTS = 64  # partial sums that a program of the reduction reads at a time
# With at most this many rows or columns, all log-sum-exps may be near 0. A constant shift leaves an
# error of a few roundings of 1 / tau, which is large beside that. The CPU's number is kFewRows in
# csrc/cpu/constants.h. A test compares both.
FEW_ROWS = 8
STRIP_FEATURES = 256  # at most, because a strip keeps a block of columns in shared memory
RUN_LENGTH = 16  # row blocks of a strip, at most


@dataclass(frozen=True)
class Operands:
    """How the operands of the products are held.

    Attributes:
        rounded: dtype to which they are rounded.
        planes: 3 for fp32 as sums of three bf16 numbers, else 1.
        precision: ``input_precision`` of ``tl.dot``.
    """

    rounded: torch.dtype
    planes: int
    precision: str

    @staticmethod
    def of(dtype: torch.dtype, product_dtype: torch.dtype | None) -> Operands:
        """The operands of inputs of that dtype; ``product_dtype`` as the operators take it."""
        rounded = rounded_dtype(dtype, product_dtype)
        planes = planes_of(rounded)
        tf32 = rounded == torch.float32 and planes == 1
        return Operands(rounded, planes, "tf32" if tf32 else "ieee")

    def depth_block(self, features: int) -> int:
        """Features that one step of the product takes."""
        return depth_block(self.rounded, self.planes, features)

    def pack(
        self,
        views: tuple[Tensor, ...],
        *,
        cosine: bool,
        eps: float,
        upstream: Upstream | None = None,
        out: Tensor | None = None,
    ) -> Packed:
        """The views as operands of the products, in the memory of ``out`` if that is given."""
        return pack(
            views,
            cosine=cosine,
            eps=eps,
            rounded=self.rounded,
            planes=self.planes,
            tf32=self.precision == "tf32",
            depth_multiple=self.depth_block(views[0].shape[1]),
            upstream=upstream,
            out=out,
        )


@dataclass(frozen=True)
class Panel:
    """Column blocks [first, last), which are computed and reduced before the next panel."""

    first: int
    last: int
    is_first: bool
    is_last: bool

    @property
    def blocks(self) -> int:
        return self.last - self.first


def has(kernel: Kernel, packed: Packed) -> bool:
    """Whether the table has the kernel for these rows and this architecture."""
    z = packed.z
    entries = configs.entries(kernel, configs.architecture(z.device), z.dtype, z.shape[1])
    return bool(entries) and entries[0].warps > 0


def config(kernel: Kernel, packed: Packed) -> Config:
    """How the kernel is compiled for these rows."""
    z = packed.z
    return configs.choose(kernel, configs.architecture(z.device), z.dtype, z.shape[1])


def fits_a_strip(packed: Packed) -> bool:
    """Whether a block of whole rows fits shared memory, and is not split into planes."""
    features = packed.padded_features
    return packed.planes == 1 and features <= STRIP_FEATURES and features & (features - 1) == 0


def run_length(row_blocks: int) -> int:
    """Row blocks of a strip: few enough that there are programs for the whole GPU."""
    return max(2, min(RUN_LENGTH, row_blocks // 8))


def workspace_bytes() -> int:
    """Bytes that partial results may take at a time."""
    return int(read_mebibytes("CJEPA_WORKSPACE_MIB", DEFAULT_WORKSPACE_MEBIBYTES) * 2**20)


def column_panels(row_blocks: int, column_blocks: int) -> tuple[list[Panel], int]:
    """Panels whose partial sums and maxima fit the workspace, and the side of a square of tiles."""
    bytes_of_column = 2 * 2 * 4 * TILE * row_blocks
    width = max(1, workspace_bytes() // bytes_of_column)
    group = GROUP
    if width < column_blocks:  # Each panel then begins with a new square.
        while group > width:
            group //= 2
        width = width // group * group
    panels = [
        Panel(first, min(first + width, column_blocks), first == 0, first + width >= column_blocks)
        for first in range(0, column_blocks, width)
    ]
    return panels, group


def has_tma(device: torch.device) -> bool:
    """Whether kernels load blocks by descriptor: the GPU has a tensor memory accelerator."""
    return configs.architecture(device) >= 90


def blocks_of(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor | Tensor:
    """The argument from which a kernel loads (rows, columns) blocks of a matrix."""
    if has_tma(matrix.device):
        return TensorDescriptor.from_tensor(matrix, [rows, columns])
    return matrix


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for other devices."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def splits(row_blocks: int, column_blocks: int, device: torch.device) -> int:
    """Programs that share the columns of owned rows, so that a small batch fills the device."""
    if device.type != "cuda":
        return min(2, column_blocks)
    return max(1, min(2 * processors(device) // row_blocks, column_blocks, 8))


def square_side(largest: int, programs_of_block: int, device: torch.device) -> int:
    """Blocks of the side of a square of G: at most ``largest``, and more than half of it.

    The products of a square take ``programs_of_block`` programs for each block of its side, and all
    of these take equally long. The side is the one whose programs leave the fewest processors idle
    in the last wave.
    """
    number = processors(device)

    def idle(side: int) -> float:
        programs = side * programs_of_block
        return -programs % number / programs

    return min(range(largest, largest // 2, -1), key=idle)
