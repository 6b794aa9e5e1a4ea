"""Choose how each Triton kernel is compiled by timing the choices on this machine's GPU.

The kernels are tuned for one size, one after the other, while the choices for the others stay as
they are. ``cjepa tune`` saves the fastest ones in ``configs.cache_file()``. From then on they go
before the package's own table.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from cjepa_kernels.definitions import EPS
from cjepa_kernels.triton import configs
from cjepa_kernels.triton.configs import Config, Kernel

PREDICTION: tuple[Kernel, ...] = ("prediction_loss", "prediction_gradient")
PREDICTION_CHOICES: dict[str, tuple[Any, ...]] = {
    "elements": (2048, 4096),
    "warps": (2, 4, 8),
    "stages": (1, 2, 3),
    "programs": (4, 8),
}
CHOICES: dict[Kernel, dict[str, tuple[Any, ...]]] = {
    "tiles": {"warps": (4, 8), "stages": (2, 3, 4)},
    "inner_tiles": {"warps": (4, 8), "stages": (2, 3, 4)},
    "strips": {
        "rows": (64, 128),
        "warps": (4, 8),
        "stages": (2, 3),
        "pipelined": (False, True),
        "fold": (True, False),
    },
    "owned": {"rows": (64, 128), "columns": (64, 128), "warps": (4, 8), "stages": (2, 3)},
    "coefficients": {"warps": (4, 8), "stages": (2, 3, 4)},
    "products": {"columns": (128, 256), "warps": (4, 8), "stages": (2, 3, 4)},
    "products_split": {"warps": (4, 8), "stages": (2, 3, 4)},
    "prediction_loss": PREDICTION_CHOICES,
    "prediction_gradient": PREDICTION_CHOICES,
}

Measure = Callable[[], float]
Report = Callable[[str], None]


def candidates(entry: Config) -> Iterator[Config]:
    """Every choice for the kernel of ``entry``."""
    choices = CHOICES[entry.kernel]
    for values in itertools.product(*choices.values()):
        yield replace(entry, **dict(zip(choices, values, strict=True)))


def tune(entries: list[Config], measure: Measure, report: Report = lambda _: None) -> list[Config]:
    """The fastest choice for each entry. Strips and owned rows may also lose to not using them.

    Args:
        entries: One entry for each kernel, for the size that is tuned.
        measure: Time of a step in seconds with the table as it is; an error rules a choice out.
        report: Called with one line of text for each choice.

    Returns:
        The winners, in the order of ``entries``.
    """
    chosen: list[Config] = []
    for entry in entries:
        best, best_time = entry, _time(measure, [*chosen, entry])
        report(f"{entry.kernel}: {_name(entry)} {1e3 * best_time:.3f} ms, as it is")
        others = [c for c in candidates(entry) if c != entry]
        if entry.kernel in ("strips", "owned"):
            others.append(replace(entry, warps=0))
        for candidate in others:
            time = _time(measure, [*chosen, candidate])
            report(f"{entry.kernel}: {_name(candidate)} {1e3 * time:.3f} ms")
            if time < best_time:
                best, best_time = candidate, time
        chosen.append(best)
    return chosen


def replaces(entries: list[Config], entry: Config) -> bool:
    """Whether one of ``entries`` is for the same kernel, architecture, operands and features."""
    return any(
        (other.kernel, other.architecture, other.bits, other.features)
        == (entry.kernel, entry.architecture, entry.bits, entry.features)
        for other in entries
    )


def _time(measure: Measure, tuned: list[Config]) -> float:
    with configs.tuned(tuned):
        try:
            return measure()
        except Exception:  # The choice cannot run, for example for want of shared memory.
            return float("inf")


def _name(entry: Config) -> str:
    if entry.warps == 0:
        return "not used"
    fields = {name: getattr(entry, name) for name in CHOICES[entry.kernel]}
    return " ".join(f"{name}={value}" for name, value in fields.items())


def entries_for(features: int, dtype: torch.dtype) -> list[Config]:
    """The table's entries for the kernels that NT-Xent uses at this width.

    Raises:
        RuntimeError: There is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("there is no CUDA device to tune for")
    from cjepa_kernels.triton.launch import Operands, fits_a_strip

    device = torch.device("cuda")
    operands = Operands.of(dtype, None)
    packed = operands.pack(
        (torch.randn(256, features, device=device, dtype=dtype),), cosine=True, eps=EPS
    )
    wide = packed.padded_features
    architecture = configs.architecture(device)
    kernels: list[Kernel] = ["strips", "inner_tiles", "tiles", "owned", "coefficients"]
    kernels.append("products" if operands.planes == 1 else "products_split")
    entries = []
    if not fits_a_strip(packed):
        kernels = [kernel for kernel in kernels if kernel not in ("strips", "owned")]
    for kernel in kernels:
        if configs.entries(kernel, architecture, packed.z.dtype, wide):
            entry = configs.choose(kernel, architecture, packed.z.dtype, wide)
            entries.append(replace(entry, architecture=architecture, features=wide))
    return entries


def prediction_entries(features: int, dtype: torch.dtype) -> list[Config]:
    """The table's entries for both directions of the prediction loss at this width."""
    architecture = configs.architecture(torch.device("cuda"))
    chosen = (configs.choose(kernel, architecture, dtype, features) for kernel in PREDICTION)
    return [replace(entry, architecture=architecture, features=features) for entry in chosen]


def measure_step(rows: int, features: int, dtype: torch.dtype) -> Measure:
    """A function that measures the median time of NT-Xent, forward and backward, at that size."""
    from triton.testing import do_bench

    from cjepa_kernels import nt_xent

    z = torch.randn(2, rows // 2, features, device="cuda", dtype=dtype).requires_grad_()

    def step() -> None:
        torch.autograd.grad(nt_xent(z[0], z[1], backend="triton").loss, z)

    return lambda: float(do_bench(step, return_mode="median")) / 1e3


def measure_prediction(rows: int, features: int, dtype: torch.dtype) -> Measure:
    """The same of the prediction loss of so many rows."""
    from triton.testing import do_bench

    from cjepa_kernels import prediction_loss

    target = torch.randn(rows, features, device="cuda", dtype=dtype)
    prediction = torch.randn_like(target).requires_grad_()

    def step() -> None:
        torch.autograd.grad(prediction_loss(prediction, target, backend="triton"), prediction)

    return lambda: float(do_bench(step, return_mode="median")) / 1e3
