"""How a problem is cut into launches: types of operands, sizes of tiles, panels of columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cjepa_kernels.environment import read_mebibytes
from cjepa_kernels.triton import allows_tf32, configs
from cjepa_kernels.triton.configs import Config, Kernel, choose
from cjepa_kernels.triton.pack import PLANES, Packed, Upstream, pack

TILE = 128  # rows and columns of a tile
SMALL = 16  # blocks: up to here one launch takes all tiles, each with its mask
GROUP = 8
ROWS = 32  # that a program of the reduction takes: few, so that a small batch has enough programs
# So few rows or columns may all have a log-sum-exp near 0, beside which the error that a constant
# shift leaves, a few roundings of 1 / tau, is large. The CPU's number is kFewRows in
# csrc/cpu/constants.h; a test compares both.
FEW = 8
SLOTS = 64  # partial sums that are read at a time


@dataclass(frozen=True)
class Operands:
    """How the rows of the product are held.

    Attributes:
        rounded: dtype that they are rounded to.
        planes: 3 for fp32 as sums of three bf16 numbers, else 1.
        precision: Of ``tl.dot``.
    """

    rounded: torch.dtype
    planes: int
    precision: str

    @staticmethod
    def of(dtype: torch.dtype, product_dtype: torch.dtype | None) -> Operands:
        rounded = product_dtype or dtype
        if rounded != torch.float32:
            return Operands(rounded, 1, "ieee")
        if allows_tf32():
            return Operands(rounded, 1, "tf32")
        return Operands(rounded, PLANES, "ieee")

    def depth_block(self, features: int) -> int:
        """Features that a step of the product takes."""
        widest = 32 if self.planes == 1 and self.rounded == torch.float32 else 64
        return next((k for k in (16, 32) if features <= k < widest), widest)

    def pack(
        self,
        views: tuple[Tensor, ...],
        *,
        cosine: bool,
        eps: float,
        upstream: Upstream | None = None,
    ) -> Packed:
        """The views as operands of the products."""
        return pack(
            views,
            cosine=cosine,
            eps=eps,
            rounded=self.rounded,
            planes=self.planes,
            tf32=self.precision == "tf32",
            depth_multiple=self.depth_block(views[0].shape[1]),
            upstream=upstream,
        )


@dataclass(frozen=True)
class Panel:
    """Column blocks [first, last) that are computed and reduced before the next."""

    first: int
    last: int
    is_first: bool
    is_last: bool

    @property
    def blocks(self) -> int:
        return self.last - self.first


STRIP_FEATURES = 256  # at most: a block of columns stays in shared memory
RUN = 16  # row blocks of a strip, at most


def has(kernel: Kernel, packed: Packed) -> bool:
    """Whether the table has the kernel for these rows and this architecture."""
    z = packed.z
    found = configs.entries(kernel, configs.architecture(z.device), z.dtype, z.shape[1])
    return bool(found) and config(kernel, packed).warps > 0


def fits_a_strip(packed: Packed) -> bool:
    """Whether whole rows of features fit, and need no split into planes."""
    features = packed.padded_features
    return packed.planes == 1 and features <= STRIP_FEATURES and features & (features - 1) == 0


def run_blocks(row_blocks: int) -> int:
    """Row blocks that a program of the strips takes: enough programs come first."""
    return max(2, min(RUN, row_blocks // 8))


def config(kernel: Kernel, packed: Packed) -> Config:
    """How the kernel is compiled for these rows."""
    z = packed.z
    return choose(kernel, configs.architecture(z.device), z.dtype, packed.padded_features)


def workspace_bytes() -> int:
    """What partial results and the like may take at a time."""
    return int(read_mebibytes("CJEPA_WORKSPACE_MIB", 256) * 2**20)


def column_panels(row_blocks: int, column_blocks: int) -> tuple[list[Panel], int]:
    """Panels whose partial sums and maxima fit the workspace, and the side of a square of tiles."""
    bytes_of_column = 2 * 2 * 4 * TILE * row_blocks
    width = max(1, workspace_bytes() // bytes_of_column)
    group = GROUP
    if width < column_blocks:  # panels begin at a square
        while group > width:
            group //= 2
        width = width // group * group
    panels = [
        Panel(first, min(first + width, column_blocks), first == 0, first + width >= column_blocks)
        for first in range(0, column_blocks, width)
    ]
    return panels, group


def has_tma(device: torch.device) -> bool:
    """Whether blocks are loaded by descriptor: the chip has a tensor memory accelerator."""
    return configs.architecture(device) >= 90


def blocks_of(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor | Tensor:
    """What a kernel loads blocks of (rows, columns) of a matrix from."""
    if has_tma(matrix.device):
        return TensorDescriptor.from_tensor(matrix, [rows, columns])
    return matrix


@lru_cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; 1 where there are none."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def splits(row_blocks: int, column_blocks: int, device: torch.device) -> int:
    """Programs that share the columns of owned rows, so that a small batch fills the device."""
    if device.type != "cuda":
        return min(2, column_blocks)
    return max(1, min(2 * processors(device) // row_blocks, column_blocks, 8))


def square_side(largest: int, programs_of_block: int, device: torch.device) -> int:
    """Blocks of the side of a square of G, at most ``largest`` and more than half of it.

    Its products take ``programs_of_block`` programs for each of them, all equally long: what they
    leave idle in their last wave over the device is to be least.
    """
    number = processors(device)

    def idle(side: int) -> float:
        programs = side * programs_of_block
        return -programs % number / programs

    return min(range(largest, largest // 2, -1), key=idle)
