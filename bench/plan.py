"""What bench/nt_xent.py measures: sizes of each part, its cells, and the callables of a cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cjepa_kernels import nt_xent
from cjepa_kernels.backends import Backend
from cjepa_kernels.bench.candidates import one_pass, products
from cjepa_kernels.bench.formulas import FORMULAS, OPTIONAL_FORMULAS, TEMPERATURE, Formula
from cjepa_kernels.bench.sizes import Size, views

Direction = Literal["forward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "forward+backward")
PARTS = ("targets", "speedups", "small", "bf16", "accuracy", "sweep")
BACKENDS: dict[str, Backend] = {"native": "native", "chunked": "chunked"}
BF16 = "native-bf16"
NO_GRAD = "native-no-grad"
TITLES = {
    "mm": "bare mm",
    "eager": "eager",
    "compiled": "torch.compile of eager",
    "lightly": "lightly's formula",
    "hjepa": "H-JEPA's formula",
    "four_blocks": "H-JEPA's, loss alone",
    "metric_learning": "pytorch-metric-learning",
    BF16: "native bf16",
    NO_GRAD: "native under no_grad",
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of every part. Above ``comparable`` rows only mm and native are run."""

    targets: tuple[Size, ...]
    speedups: Size
    metric_learning: Size
    small: tuple[Size, ...]
    bf16: tuple[Size, ...]
    sweep: tuple[Size, ...]
    comparable: int


FULL = Sizes(
    targets=(
        Size(2048, 256),
        Size(8192, 128),
        Size(8192, 256),
        Size(8192, 768),
        Size(32768, 256),
    ),
    speedups=Size(8192, 256),
    metric_learning=Size(256, 256),
    small=tuple(
        Size(rows, features) for rows in (16, 64, 256, 1024) for features in (64, 128, 768)
    ),
    bf16=(Size(2048, 256), Size(8192, 256)),
    # With 2048, 8192 and 32768 of the targets: time against M at D = 256.
    sweep=(Size(256, 256), Size(512, 256), Size(1024, 256), Size(4096, 256), Size(16384, 256)),
    comparable=16384,
)
QUICK = Sizes(
    targets=(Size(32, 8), Size(96, 8)),
    speedups=Size(32, 8),
    metric_learning=Size(16, 8),
    small=(Size(16, 8),),
    bf16=(Size(32, 8),),
    sweep=(Size(16, 8),),
    comparable=64,
)


@dataclass(frozen=True)
class Cell:
    """Candidates that are timed in turn on the same inputs.

    Attributes:
        part: One of ``PARTS``.
        size: Rows and features.
        direction: What one call does.
        names: Candidates, ``mm`` being one bare product forward and three forward + backward.
        share: Of the time for one cell.
        least: Rounds at least.
    """

    part: str
    size: Size
    direction: Direction
    names: tuple[str, ...]
    share: float = 1.0
    least: int = 5


def plan(sizes: Sizes, parts: Sequence[str]) -> list[Cell]:
    """The cells of the parts that were asked for, in the order of ``PARTS``."""
    cells = [
        *(_with_eager("targets", size, direction, sizes) for size, direction in _both(sizes)),
        Cell(
            "speedups",
            sizes.speedups,
            "forward+backward",
            ("mm", "native", "eager", "compiled", "lightly", "hjepa", "four_blocks"),
            least=4,
        ),
        Cell(
            "speedups",
            sizes.metric_learning,
            "forward+backward",
            ("mm", "native", "eager", "metric_learning"),
        ),
        *(
            Cell("small", size, direction, ("mm", "native", "eager"), share=0.5)
            for size in sizes.small
            for direction in DIRECTIONS
        ),
        *(
            Cell("bf16", size, direction, ("native", BF16))
            for size in sizes.bf16
            for direction in DIRECTIONS
        ),
        *(_with_eager("sweep", size, "forward+backward", sizes) for size in sizes.sweep),
    ]
    return [cell for cell in cells if cell.part in parts]


def _both(sizes: Sizes) -> list[tuple[Size, Direction]]:
    return [(size, direction) for size in sizes.targets for direction in DIRECTIONS]


def _with_eager(part: str, size: Size, direction: Direction, sizes: Sizes) -> Cell:
    """mm and native, with the other paths beside them where the size allows it."""
    names = ("mm", "native", NO_GRAD) if direction == "forward" else ("mm", "native")
    if size.rows > sizes.comparable:
        return Cell(part, size, direction, names, least=3)
    least = 3 if size.rows == sizes.comparable else 5
    return Cell(part, size, direction, (*names, "chunked", "eager"), least=least)


def find_formula(name: str, inputs: tuple[Tensor, Tensor]) -> Formula:
    """The loss called ``name``; an optional one is tried on the inputs first.

    Raises:
        ImportError: If a library is missing.
        RuntimeError: If ``torch.compile`` does not work here, for lack of a compiler for example.
    """
    if name in BACKENDS:
        backend = BACKENDS[name]
        return lambda z_i, z_j: nt_xent(z_i, z_j, temperature=TEMPERATURE, backend=backend).loss
    if name in OPTIONAL_FORMULAS:
        formula = OPTIONAL_FORMULAS[name]()
        one_pass(formula, inputs, "forward+backward")()
        return formula
    return FORMULAS[name]


def callables(cell: Cell) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """What to time, by name, and why a name is left out."""
    plain = views(cell.size)
    runs: dict[str, Callable[[], object]] = {}
    missing = {}
    for name in cell.names:
        if name == "mm":
            runs[name] = products(plain, cell.direction)
            continue
        dtype = torch.bfloat16 if name == BF16 else torch.float32
        inputs = _leaves(plain, dtype)
        try:
            formula = find_formula("native" if name in (BF16, NO_GRAD) else name, inputs)
        except (ImportError, RuntimeError) as error:
            missing[name] = str(error).strip().splitlines()[0]
            continue
        if name == NO_GRAD:
            formula = torch.no_grad()(formula)
        runs[name] = one_pass(formula, inputs, cell.direction)
    return runs, missing


def _leaves(plain: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    z_i, z_j = (z.detach().to(dtype, copy=True).requires_grad_() for z in plain)
    return z_i, z_j
