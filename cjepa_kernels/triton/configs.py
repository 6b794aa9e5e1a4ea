"""How each kernel is compiled: from a table by architecture, and what was tuned on this machine.

``configs.json`` lists choices; one that ``cjepa tune`` found on this machine goes before them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch

# inner_tiles: tiles of one plane without a mask, where they have an entry of their own.
Kernel = Literal[
    "tiles", "inner_tiles", "strips", "owned", "coefficients", "products", "products_split"
]
KERNELS: tuple[str, ...] = get_args(Kernel)
INTERPRETED = 90  # what the interpreter stands for


@dataclass(frozen=True)
class Config:
    """One choice.

    Attributes:
        architecture: The lowest that it serves: 90 is compute capability 9.0.
        kernel: Name of the kernel.
        bits: Of the operands.
        features: At most.
        warps, stages: ``num_warps`` and ``num_stages`` of Triton; 0 warps: not to be used.
        rows: Of a tile where the kernel leaves a choice (strips, owned).
        columns: The same (owned, products).
        pipelined: Strips: overlap the exponentials of a tile with the product of the next.
        fold: Strips: keep half as many column sums (see ``similarity.fold``).
    """

    architecture: int
    kernel: Kernel
    bits: int
    features: int
    warps: int
    stages: int
    rows: int = 128
    columns: int = 64
    pipelined: bool = False
    fold: bool = True


def architecture(device: torch.device) -> int:
    """Compute capability in tens: 90 for 9.0."""
    if device.type != "cuda":
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def entries(
    kernel: Kernel, architecture: int, dtype: torch.dtype, features: int
) -> tuple[Config, ...]:
    """Those of the table that serve, the best first.

    Best are those for the highest architecture, of these those for the fewest features.
    """
    return _entries(_device(), kernel, architecture, dtype, features)


@lru_cache
def _entries(
    device: int, kernel: Kernel, architecture: int, dtype: torch.dtype, features: int
) -> tuple[Config, ...]:
    found = [
        entry
        for entry in table()
        if entry.kernel == kernel
        and entry.architecture <= architecture
        and entry.bits == 8 * dtype.itemsize
        and entry.features >= features
    ]
    return tuple(sorted(found, key=lambda entry: (-entry.architecture, entry.features)))


def choose(kernel: Kernel, architecture: int, dtype: torch.dtype, features: int) -> Config:
    """The best entry.

    Raises:
        RuntimeError: There is none: this architecture is older than any in the table.
    """
    found = entries(kernel, architecture, dtype, features)
    if not found:
        raise RuntimeError(
            f"there is no configuration of the kernel {kernel} for {dtype}, {features} features "
            f"and compute capability {architecture / 10}"
        )
    return found[0]


_trial: list[Config] = []  # what is being tuned


def table() -> tuple[Config, ...]:
    """What is being tuned, what was tuned here, then the package's own table."""
    return (*_trial, *_table(_device()))


def _device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


@lru_cache
def _table(device: int) -> tuple[Config, ...]:
    own = json.loads(Path(__file__).with_name("configs.json").read_text())
    return (*read(cache_file()), *(Config(**entry) for entry in own))


def forget() -> None:
    """Read and search the table again."""
    _table.cache_clear()
    _entries.cache_clear()


@contextmanager
def tuned(found: list[Config]) -> Iterator[None]:
    """These choices go before all others, for a while."""
    _trial[:] = found
    _entries.cache_clear()
    try:
        yield
    finally:
        _trial.clear()
        _entries.cache_clear()


def cache_file() -> Path:
    """Where tuned choices are kept: ``$XDG_CACHE_HOME/cjepa_kernels``, by device."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return base / "cjepa_kernels" / f"{device.replace(' ', '-')}.json"


def read(path: Path) -> list[Config]:
    """Tuned choices; none if the file is missing or of another version."""
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text())
        return [Config(**entry) for entry in found]
    except (OSError, ValueError, TypeError):
        return []


def write(path: Path, found: list[Config]) -> None:
    """Keep tuned choices: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps([asdict(entry) for entry in found], indent=1))
    temporary.replace(path)
    forget()
