"""How each kernel is compiled, by architecture, dtype and number of features.

``configs.json`` lists the package's choices. A choice that ``cjepa tune`` found on this machine
goes before them.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

from cjepa_kernels.files import atomic_write
from cjepa_kernels.triton import planned

# "inner_tiles" are tiles of one plane without a mask, where the table has an entry for them.
# "wide" and "pairs" are the Gluon kernels for Hopper, and in the backward those named "hopper_".
# Both directions of the prediction loss have entries of their own.
Kernel = Literal[
    "tiles",
    "inner_tiles",
    "strips",
    "wide",
    "pairs",
    "owned",
    "coefficients",
    "products",
    "products_split",
    "hopper_owned",
    "hopper_strips",
    "hopper_tiles",
    "hopper_products",
    "prediction_loss",
    "prediction_gradient",
]
TILE = 128  # rows and columns of a square tile; padded rows are a multiple of it
INTERPRETED = 90  # architecture that the interpreter imitates


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled.

    Attributes:
        architecture: Lowest architecture that the choice serves; 90 is compute capability 9.0.
        kernel: Name of the kernel.
        bits: Bits of an operand's number.
        features: Largest number of padded features that it serves.
        warps: ``num_warps`` of Triton; 0 if the kernel must not be used.
        stages: ``num_stages`` of Triton; for Gluon kernels the slots of the ring of rows.
        rows: Rows of a tile, for strips and owned rows; for the Gluon kernels of squares too.
        columns: Columns of a tile, for owned rows and products.
        pipelined: For strips: overlap the exponentials of a tile with the product of the next.
            For owned rows in Gluon: overlap those of the next tile with the second product of this.
        fold: For strips: keep half as many column sums (see ``fold`` in ``kernels/similarity.py``).
        step: For pairs, and for strips in Gluon: features that pass through the ring at a time.
        elements: For the prediction loss: elements of whole rows that a program takes at a time.
        programs: For the prediction loss: programs for each multiprocessor of the GPU, at most.
    """

    architecture: int
    kernel: Kernel
    bits: int
    features: int
    warps: int
    stages: int
    rows: int = TILE
    columns: int = 64
    pipelined: bool = False
    fold: bool = True
    step: int = 0
    elements: int = 0
    programs: int = 0


def architecture(device: torch.device) -> int:
    """Ten times the compute capability: 90 for 9.0."""
    if device.type != "cuda":
        return INTERPRETED
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def entries(
    kernel: Kernel, architecture: int, dtype: torch.dtype, features: int
) -> tuple[Config, ...]:
    """Entries of the table that serve this problem, the best first.

    An entry for a higher architecture is better. Among entries for the same architecture, one for
    fewer features is better.
    """
    return _entries(
        device=_device(),
        kernel=kernel,
        architecture=architecture,
        dtype=dtype,
        features=features,
    )


@lru_cache
def _entries(
    device: int, kernel: Kernel, architecture: int, dtype: torch.dtype, features: int
) -> tuple[Config, ...]:
    matching = [
        entry
        for entry in table()
        if entry.kernel == kernel
        and entry.architecture <= architecture
        and entry.bits == 8 * dtype.itemsize
        and entry.features >= features
    ]
    return tuple(sorted(matching, key=lambda entry: (-entry.architecture, entry.features)))


def choose(kernel: Kernel, architecture: int, dtype: torch.dtype, features: int) -> Config:
    """The best entry.

    Raises:
        RuntimeError: There is none, because the architecture is older than any in the table.
    """
    matching = entries(kernel, architecture, dtype, features)
    if not matching:
        raise RuntimeError(
            f"there is no configuration of the kernel {kernel} for {dtype}, {features} features "
            f"and compute capability {architecture / 10}"
        )
    return matching[0]


_trial: list[Config] = []  # choices that are being timed


def table() -> tuple[Config, ...]:
    """Choices that are being timed, then those that were tuned here, then the package's own."""
    return (*_trial, *_table(_device()))


def _device() -> int:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else -1


@lru_cache
def _table(device: int) -> tuple[Config, ...]:
    own = json.loads(Path(__file__).with_name("configs.json").read_text())
    return (*_read_or_warn(cache_file()), *(Config(**entry) for entry in own))


def forget() -> None:
    """Read and search the table again."""
    _table.cache_clear()
    _search_again()


@contextmanager
def tuned(choices: list[Config]) -> Iterator[None]:
    """Inside the context these choices go before all others."""
    _trial[:] = choices
    _search_again()
    try:
        yield
    finally:
        _trial.clear()
        _search_again()


def _search_again() -> None:
    """Forget what was chosen from the table, and the launch plans that depend on it."""
    _entries.cache_clear()
    planned.forget()


def cache_file() -> Path:
    """The file of the choices tuned for this device, in ``$XDG_CACHE_HOME/cjepa_kernels``."""
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return base / "cjepa_kernels" / f"{device.replace(' ', '-')}.json"


def read(path: Path) -> list[Config]:
    """Tuned choices; none if there is no file.

    Raises:
        ValueError: The file cannot be read, is damaged, or is of another version.
    """
    try:
        choices: list[dict[str, Any]] = json.loads(path.read_text())
        return [Config(**entry) for entry in choices]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"the file of tuned choices {str(path)!r} cannot be used ({error}); delete it, "
            "and run cjepa tune again for the sizes that you need"
        ) from error


def _read_or_warn(path: Path) -> list[Config]:
    """The same, without tuned choices and with a warning where the file cannot be used."""
    try:
        return read(path)
    except ValueError as error:
        warnings.warn(f"{error}; until then the package's own choices are used", stacklevel=2)
        return []


def write(path: Path, choices: list[Config]) -> None:
    """Save tuned choices. The file is replaced as a whole or not at all."""
    atomic_write(path, json.dumps([asdict(entry) for entry in choices], indent=1))
    forget()
