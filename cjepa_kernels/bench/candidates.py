"""The losses that are compared: this package's and other projects', and the bare products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels import nt_xent
from cjepa_kernels.backends import Backend, backends
from cjepa_kernels.bench import formulas
from cjepa_kernels.bench.formulas import Formula
from cjepa_kernels.bench.sizes import DTYPES, Size, views
from cjepa_kernels.bench.tensor_bytes import Bytes, count, scaled
from cjepa_kernels.extras import require

OURS, CHUNKED, MM, EAGER, COMPILED = "cjepa_kernels", "chunked", "mm", "eager", "compiled"
NATIVE, REFERENCE = "native", "reference"
FORWARD, BOTH = "forward", "forward+backward"
DIRECTIONS = (FORWARD, BOTH)
PRODUCTS = {FORWARD: 1, BOTH: 3}  # Matrix products that the loss contains.


@dataclass(frozen=True)
class Candidate:
    """A loss that is measured.

    Attributes:
        name: Name in results.
        title: Title in tables and plots.
        make: Makes the loss at a temperature. It raises ImportError or RuntimeError where the loss
            is not available.
        degree: Power of M with which its tensors grow. With 1 they fit whatever M is.
        same_loss: Whether it is NT-Xent, or another loss of the same M x M matrix.
        devices: Device types on which it runs.
    """

    name: str
    title: str
    make: Callable[[float], Formula]
    degree: int = 2
    same_loss: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")


def _package(temperature: float, *, backend: Backend) -> Formula:
    return lambda z_i, z_j: nt_xent(z_i, z_j, temperature=temperature, backend=backend).loss


def _inf_cl(temperature: float) -> Formula:
    """Inf-CL's InfoNCE of every row against the rolled rows: M x M logits with the diagonal."""
    flash_loss = require("inf_cl.flash", extra="bench-gpu").cal_flash_loss

    def loss(z_i: Tensor, z_j: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z_i, z_j]), dim=1)
        scale = torch.tensor(1 / temperature, device=z.device)
        width = math.gcd(z.shape[1], 256)  # The kernel takes D in heads of a power of two.
        losses: Tensor = flash_loss(z, z.roll(len(z_i), 0), scale=scale, head_dim=width)
        return losses.mean()

    return loss


def _siglip(temperature: float) -> Formula:
    """SigLIP's sigmoid loss of every row against the rolled rows: M x M logits."""
    siglip_loss = require("siglip_kernel", extra="bench-gpu").fused_siglip_loss

    def loss(z_i: Tensor, z_j: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z_i, z_j]), dim=1)
        log_scale = torch.tensor(-math.log(temperature), device=z.device)
        bias = torch.zeros((), device=z.device)
        result: Tensor = siglip_loss(z, z.roll(len(z_i), 0).contiguous(), log_scale, bias)
        return result

    return loss


def _of(formula: Callable[..., Tensor]) -> Callable[[float], Formula]:
    return lambda temperature: partial(formula, temperature=temperature)


CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        Candidate(OURS, "cjepa_kernels", partial(_package, backend="auto"), degree=1),
        Candidate(
            CHUNKED,
            "cjepa_kernels, chunked",
            partial(_package, backend="chunked"),
            degree=1,
            devices=("cpu",),
        ),
        Candidate(EAGER, "plain formula", _of(formulas.eager)),
        Candidate(COMPILED, "plain formula, compiled", formulas.compiled),
        Candidate("lightly", "lightly's formula", _of(formulas.lightly)),
        Candidate("hjepa", "H-JEPA's formula", _of(formulas.hjepa)),
        Candidate(
            "metric_learning",
            "pytorch-metric-learning",
            formulas.metric_learning,
            degree=3,
        ),
        Candidate(
            "inf_cl", "Inf-CL (InfoNCE)", _inf_cl, degree=1, same_loss=False, devices=("cuda",)
        ),
        Candidate(
            "siglip_kernel",
            "siglip-kernel (sigmoid)",
            _siglip,
            degree=1,
            same_loss=False,
            devices=("cuda",),
        ),
    )
}
# The scripts of bench/ compare these, and ``cjepa bench`` does not.
FURTHER_CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        Candidate(NATIVE, "native", partial(_package, backend="native"), degree=1),
        Candidate(REFERENCE, "reference", partial(_package, backend="reference")),
        Candidate("four_blocks", "H-JEPA's formula, loss alone", _of(formulas.four_blocks)),
    )
}
TITLES = {name: one.title for name, one in (CANDIDATES | FURTHER_CANDIDATES).items()}
TITLES[MM] = "bare products"


def find(name: str) -> Candidate:
    """The candidate of a name.

    Raises:
        KeyError: If there is none.
    """
    return CANDIDATES[name] if name in CANDIDATES else FURTHER_CANDIDATES[name]


def is_peer(name: str) -> bool:
    """Whether a candidate other than ours computes the same loss, so that a verdict is due."""
    return name in CANDIDATES and CANDIDATES[name].same_loss and name != OURS


def on_device(device: str) -> dict[str, Candidate]:
    """The candidates of a device. The chunked back end is one only beside a faster one."""
    kind = torch.device(device).type
    usable = {name: one for name, one in CANDIDATES.items() if kind in one.devices}
    if backend_of(device) == CHUNKED:
        usable.pop(CHUNKED, None)
    return usable


def backend_of(device: str) -> str:
    """The back end that ``backend="auto"`` takes on a device."""
    kind = torch.device(device).type
    return next(
        name
        for name, status in backends().items()
        if status.available and not {kind, "any"}.isdisjoint(status.devices)
    )


def try_out(candidate: Candidate, device: str, dtype: torch.dtype, temperature: float) -> None:
    """Run forward and backward of the candidate on a small input.

    Raises:
        ImportError: If a library is missing; the message says how to get it.
        RuntimeError: If it does not work here, ``torch.compile`` without a compiler for example.
    """
    inputs = views(Size(128, 64), device=device, dtype=dtype)
    torch.autograd.grad(candidate.make(temperature)(*inputs), inputs)


def one_pass(
    formula: Formula, inputs: tuple[Tensor, Tensor], direction: str
) -> Callable[[], object]:
    """The call of a formula: forward with gradients enabled, then backward for ``BOTH``."""
    if direction == FORWARD:
        return lambda: formula(*inputs)
    return lambda: torch.autograd.grad(formula(*inputs), inputs)


def products(inputs: tuple[Tensor, Tensor], direction: str) -> Callable[[], object]:
    """The bare matrix products that the loss contains, written into one buffer."""
    z = F.normalize(torch.cat(inputs).detach().float(), dim=1).to(inputs[0].dtype)
    out = torch.empty(len(z), len(z), dtype=z.dtype, device=z.device)
    return lambda: [torch.mm(z, z.T, out=out) for _ in range(PRODUCTS[direction])]


def bytes_of(name: str, size: Size, dtype: str) -> Bytes:
    """Bytes that forward + backward of a candidate hold at once and move.

    A candidate of degree 1 reads the views in both passes and writes the gradients once. It is not
    known what ``torch.compile`` fuses, so the bytes of the plain formula are its bound.
    """
    rows, features = size
    item = DTYPES[dtype].itemsize
    if name == MM:
        matrix = item * rows**2
        return Bytes(matrix, 3 * (matrix + 2 * item * rows * features))
    candidate = CANDIDATES[EAGER if name == COMPILED else name]
    if candidate.degree == 1:
        return Bytes(item * rows * features, 3 * item * rows * features)
    formula = candidate.make(formulas.TEMPERATURE)
    return scaled(formula, size, DTYPES[dtype], degree=candidate.degree)


def count_on_cpu(name: str, size: Size, dtype: str) -> Bytes:
    """The same bytes, counted at the size itself. The candidate has to be quick there."""
    return count(CANDIDATES[name].make(formulas.TEMPERATURE), size, DTYPES[dtype])
