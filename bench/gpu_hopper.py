"""The Gluon kernels on a Hopper GPU: parity first, then time beside the Triton kernels.

    python bench/gpu_hopper.py [--alternatives] [--no-save]

For each number of features the script compares the forward of NT-Xent by a Gluon kernel with the
forward by the Triton kernels, anchor by anchor, and with the formula in fp64. It compares the
gradients in the same way, row by row, both from a forward by the Triton kernels. Only then it times
both kinds of kernels, in turn, beside the bare product torch.mm(z, z.T), of which forward and
backward do the work of three. It writes bench/results/gpu_hopper.json after every size. A
combination that fails is named, the others are measured all the same, and the exit code is 1. On
any other device the script says so and ends.

``--alternatives`` also compares and times other configurations of the backward than those of
``configs.json``, which were chosen without a GPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cjepa_kernels import nt_xent
from cjepa_kernels.bench.candidates import BOTH, FORWARD, products
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.script_options import read_options, save
from cjepa_kernels.bench.timing import interleaved_on_gpu
from cjepa_kernels.error_lines import kind_and_first_line
from cjepa_kernels.tables import print_table
from cjepa_kernels.triton import configs
from cjepa_kernels.triton.configs import Config, Kernel

GLUON, TRITON, MM = "Gluon kernels", "Triton kernels", "torch.mm"
VARIABLE = "CJEPA_GLUON"
CAPABILITY = (9, 0)
ROWS = (65536, 16384)
FEATURES = (256, 512, 128, 768, 64, 384, 640)  # what matters most comes first
BACKWARD_FEATURES = (256, 512, 128, 768, 64, 1024)
BACKWARD = "backward"
DTYPES = (torch.bfloat16, torch.float16)
PARITY_ROWS = 16384 + 2 * 77  # the last block is not whole
CHUNK = 2048  # rows whose similarities are held in fp64 at a time
SAMPLE = 512  # anchors that are compared with the formula in fp64
TEMPERATURE = 0.1
SECONDS = 1.0  # for the candidates of one size
# Both kernels round the same operands, and a tensor core cuts off bits of its sums: 1e-5 of a
# similarity, and ten times as much of an exponential.
LARGEST_DIFFERENCE = 1e-4
# Of the gradient of a row, beside the usual norm of one. Both kernels round G, and a number between
# two of its dtype may go either way. A box of 64 x 64 numbers that is missing changes rows by 4e-3
# of the sum of the magnitudes, of which most cancels.
LARGEST_GRADIENT_DIFFERENCE = 1e-3
# Relative errors that the rounding of operands may cause. python_tests/triton/test_kernels.py has
# the same bounds.
LARGEST_ERROR = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


@contextmanager
def gluon(allowed: bool) -> Iterator[None]:
    """Inside the context the Gluon kernels are used wherever they serve, or never."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "1" if allowed else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def views(rows: int, features: int, dtype: torch.dtype, device: str = "cuda") -> list[Tensor]:
    """Two views whose pairs are alike, as those of a trained model are."""
    generator = torch.Generator(device).manual_seed(rows + features)
    shape = (rows // 2, features)
    x, y = (torch.randn(shape, device=device, generator=generator) for _ in range(2))
    return [x.to(dtype), (x + 0.7 * y).to(dtype)]


def forward(x: Tensor, y: Tensor, *, allowed: bool) -> Any:
    """The loss of each anchor and the metrics."""
    with gluon(allowed), torch.no_grad():
        return nt_xent(x, y, temperature=TEMPERATURE, reduction="none", backend="triton")


def exact_losses(x: Tensor, y: Tensor, anchors: Tensor) -> Tensor:
    """The losses of some anchors by the formula in fp64."""
    z = F.normalize(torch.cat([x, y]).double(), dim=1)
    logits = z[anchors] @ z.T / TEMPERATURE
    logits.scatter_(1, anchors[:, None], -torch.inf)
    positive = (anchors + len(x)) % len(z)
    return torch.logsumexp(logits, 1) - logits.gather(1, positive[:, None])[:, 0]


def gradients(x: Tensor, y: Tensor, *, allowed: bool) -> Tensor:
    """(M, D) the gradient of both views, in fp32, of losses that have different weights."""
    with gluon(allowed=False):
        leaves = [view.detach().requires_grad_() for view in (x, y)]
        losses = nt_xent(*leaves, temperature=TEMPERATURE, reduction="none", backend="triton").loss
    with gluon(allowed):
        return torch.cat(torch.autograd.grad(losses, leaves, loss_weights(losses))).float()


def loss_weights(like: Tensor) -> Tensor:
    """Upstream gradients of the losses."""
    return torch.linspace(0.5, 1.5, like.shape[0], device=like.device, dtype=like.dtype)


def exact_gradients(x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """The gradients of some rows by the formula in fp64.

    With L_a = LSE over b != a of s_ab / tau, minus s_a / tau of the positive, and with u_a the
    weight of L_a and p_ab = exp(s_ab / tau - LSE_a),

        dL/dz_a = (1 / tau) (sum over b != a of (u_a p_ab + u_b p_ba) z_b - (u_a + u_pos) z_pos).
    """
    raw = torch.cat([x, y]).double()
    norms = raw.norm(dim=1, keepdim=True)
    z = raw / norms
    count = len(z)
    every = torch.arange(count, device=z.device)
    lse = torch.cat([_logits(z, some).logsumexp(1) for some in every.split(CHUNK)])
    weights = loss_weights(lse)
    logits = _logits(z, rows)
    g = (logits - lse[rows, None]).exp() * weights[rows, None]
    g += (logits - lse[None, :]).exp() * weights[None, :]
    positive = (rows + count // 2) % count
    grad = g @ z - (weights[rows] + weights[positive])[:, None] * z[positive]
    grad /= TEMPERATURE
    grad -= (grad * z[rows]).sum(1, keepdim=True) * z[rows]
    return grad / norms[rows]


def _logits(z: Tensor, rows: Tensor) -> Tensor:
    """s_ab / tau of some rows, -inf where a row meets itself."""
    logits = z[rows] @ z.T / TEMPERATURE
    return logits.scatter_(1, rows[:, None], -torch.inf)


def backward_parity(
    x: Tensor, y: Tensor, gradients: Callable[..., Tensor] = gradients, sample: int = SAMPLE
) -> dict[str, float | bool]:
    """The same for the gradients of the rows."""
    new, again = (gradients(x, y, allowed=True) for _ in range(2))
    today = gradients(x, y, allowed=False)
    rows = torch.randperm(len(new), generator=torch.Generator().manual_seed(0))[:sample]
    rows = rows.to(x.device)
    exact = exact_gradients(x, y, rows)
    usual_norm = today.norm(dim=1).square().mean().sqrt()
    difference = float((new - today).norm(dim=1).max() / usual_norm)
    error = float((new[rows] - exact).norm() / exact.norm())
    same_bits = bool(torch.equal(new, again))
    passed = not (
        not difference <= LARGEST_GRADIENT_DIFFERENCE
        or not error <= LARGEST_ERROR[x.dtype]
        or not same_bits
    )
    return {"difference": difference, "error": error, "same_bits": same_bits, "passed": passed}


def parity(
    x: Tensor, y: Tensor, forward: Callable[..., Any] = forward, sample: int = SAMPLE
) -> dict[str, float | bool]:
    """How far the Gluon kernel is from the Triton kernels and from fp64, and whether it passes."""
    new, again = (forward(x, y, allowed=True) for _ in range(2))
    today = forward(x, y, allowed=False)
    anchors = torch.randperm(2 * len(x), generator=torch.Generator().manual_seed(0))[:sample]
    anchors = anchors.to(x.device)
    exact = exact_losses(x, y, anchors)
    difference = float(((new.loss - today.loss).abs() / today.loss.abs()).max())
    error = float(((new.loss[anchors] - exact).abs() / exact.abs()).max())
    accuracy = float((new.accuracy - today.accuracy).abs())
    same_bits = bool(torch.equal(new.loss, again.loss))
    # "not (a <= b)" is true for NaN, too.
    passed = not (
        not difference <= LARGEST_DIFFERENCE
        or not error <= LARGEST_ERROR[x.dtype]
        or not accuracy <= 2 / len(x)  # a tie may fall either way
        or not same_bits
    )
    return {
        "difference": difference,
        "error": error,
        "accuracy_difference": accuracy,
        "same_bits": same_bits,
        "passed": passed,
    }


def uses_gluon(x: Tensor, y: Tensor) -> bool:
    """Whether a Gluon kernel takes the inner tiles of these views.

    If it could not be compiled, the Triton kernels would be compared with themselves.
    """
    from cjepa_kernels.triton import hopper

    found: list[bool] = []
    launch = hopper.HopperTiles.launch

    def noted(self: Any, panel: Any) -> None:
        found.append(True)
        launch(self, panel)

    hopper.HopperTiles.launch = noted  # type: ignore[method-assign]
    try:
        forward(x, y, allowed=True)
    finally:
        hopper.HopperTiles.launch = launch  # type: ignore[method-assign]
    return bool(found)


def uses_gluon_backward(x: Tensor, y: Tensor) -> bool:
    """Whether Gluon kernels take the products of the backward."""
    from cjepa_kernels.triton import hopper_gradients

    found: list[bool] = []
    products = hopper_gradients.products

    def noted(of: Any) -> Any:
        result = products(of)
        found.append(result is not None)
        return result

    hopper_gradients.products = noted
    try:
        gradients(x, y, allowed=True)
    finally:
        hopper_gradients.products = products
    return found == [True]


def both(x: Tensor, y: Tensor, *, allowed: bool) -> tuple[Tensor, ...]:
    """Forward and backward of the mean loss."""
    with gluon(allowed):
        leaves = [view.detach().requires_grad_() for view in (x, y)]
        loss = nt_xent(*leaves, temperature=TEMPERATURE, backend="triton").loss
        return torch.autograd.grad(loss, leaves)


def times(x: Tensor, y: Tensor, direction: str = FORWARD) -> dict[str, Any]:
    """Seconds of a direction on the device: median, p20 and p80 of each candidate."""
    call = forward if direction == FORWARD else both
    builds = {
        GLUON: lambda: partial(call, x, y, allowed=True),
        TRITON: lambda: partial(call, x, y, allowed=False),
        MM: lambda: products((x, y), direction),
    }
    found, errors = interleaved_on_gpu(builds, seconds=SECONDS)
    return {**found, **{name: {"error": error} for name, error in errors.items()}}


def backward_config(kernel: Kernel, features: int, **options: Any) -> Config:
    """An entry of the table of configurations for operands of 16 bits."""
    common: dict[str, Any] = {"architecture": 90, "bits": 16, "warps": 4}
    return Config(kernel=kernel, features=features, **{**common, **options})


# By features: a title, and the entries that go before the package's own.
NOT_OWNED = {"warps": 0, "stages": 0}
TALL_JOBS = {"stages": 4, "rows": 128, "columns": 256}
ALTERNATIVES: dict[int, dict[str, list[Config]]] = {
    128: {
        "64 columns": [backward_config("hopper_owned", 128, stages=12, columns=64, pipelined=True)],
        "one product after the other": [
            backward_config("hopper_owned", 128, stages=6, columns=128, pipelined=False)
        ],
    },
    256: {
        "64 columns, pipelined": [
            backward_config("hopper_owned", 256, stages=5, columns=64, pipelined=True)
        ],
        "squares": [backward_config("hopper_owned", 256, **NOT_OWNED)],
    },
    512: {
        "jobs of 128 rows": [backward_config("hopper_products", 512, **TALL_JOBS)],
        "tiles": [backward_config("hopper_strips", 512, **NOT_OWNED)],
    },
    768: {"jobs of 128 rows": [backward_config("hopper_products", 768, **TALL_JOBS)]},
}


def check_alternative(features: int, title: str) -> Record:
    """The parity of an alternative, and its times at each M if it passes."""
    entries = ALTERNATIVES[features][title]

    def chosen(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with configs.tuned(entries):
            return function(*args, **options)

    with configs.tuned(entries):
        record = check(features, torch.bfloat16, BACKWARD)
    record["alternative"] = title
    for rows in ROWS if record["passed"] else ():
        x, y = views(rows, features, torch.bfloat16)
        builds = {
            GLUON: lambda x=x, y=y: partial(both, x, y, allowed=True),
            title: lambda x=x, y=y: partial(chosen, both, x, y, allowed=True),
        }
        found, _ = interleaved_on_gpu(builds, seconds=SECONDS)
        record[f"times of M = {rows}"] = found
    return record


def check(features: int, dtype: torch.dtype, direction: str = FORWARD) -> Record:
    """The parity of one combination, as a record."""
    record: Record = {
        "D": features,
        "dtype": str(dtype).removeprefix("torch."),
        "direction": direction,
    }
    is_used, compare = {
        FORWARD: (uses_gluon, parity),
        BACKWARD: (uses_gluon_backward, backward_parity),
    }[direction]
    try:
        x, y = views(PARITY_ROWS, features, dtype)
        if not is_used(x, y):
            return {**record, "passed": False, "reason": "no Gluon kernel was launched"}
        return {**record, **compare(x, y)}
    except Exception as error:
        return {**record, "passed": False, "reason": kind_and_first_line(error)}


def why_not() -> str | None:
    """Why the kernels cannot run here; None if they can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != CAPABILITY:
        number = ".".join(map(str, capability))
        return f"the kernels need compute capability 9.0, this GPU has {number}"
    return None


def main() -> int:
    flag = {"action": "store_true", "help": "compare other configurations of the backward too"}
    options = read_options(__doc__, {"--alternatives": flag})
    reason = why_not()
    if reason is not None:
        print(f"Nothing was measured: {reason}.")
        return 0
    checks, rows, table, alternatives = [], [], [], []

    def write() -> None:
        more = {"alternatives": alternatives} if alternatives else {}
        save(options, "gpu_hopper", rows, parity=checks, **more, of_kernels=True)

    for dtype in DTYPES:
        for direction, several in ((FORWARD, FEATURES), (BACKWARD, BACKWARD_FEATURES)):
            for features in several:
                record = check(features, dtype, direction)
                checks.append(record)
                print(record, flush=True)
    write()
    passed = {
        (record["D"], record["direction"])
        for record in checks
        if record["passed"] and record["dtype"] == "bfloat16"
    }
    timed = [(features, FORWARD, number) for features in FEATURES for number in ROWS]
    timed += [(features, BOTH, number) for features in BACKWARD_FEATURES for number in ROWS]
    for features, direction, number in timed:
        if (features, FORWARD if direction == FORWARD else BACKWARD) not in passed:
            continue
        found = times(*views(number, features, torch.bfloat16), direction)
        cell = {"M": number, "D": features, "pass": direction}
        rows += [{**cell, "name": n, **t} for n, t in found.items()]
        medians = {name: t.get("median", float("nan")) for name, t in found.items()}
        table.append(
            [
                str(number),
                str(features),
                direction,
                f"{1e3 * medians[GLUON]:.3f}",
                f"{medians[GLUON] / medians[TRITON]:.2f}",
                f"{medians[GLUON] / medians[MM]:.2f}",
            ]
        )
        print(table[-1], flush=True)
        write()
    print_table(["M", "D", "pass", "ms", "of the Triton kernels", "of the bare products"], table)
    for features, titles in ALTERNATIVES.items() if options.alternatives else ():
        for title in titles:
            alternatives.append(check_alternative(features, title))
            print(alternatives[-1], flush=True)
            write()
    return 0 if all(record["passed"] for record in [*checks, *alternatives]) else 1


if __name__ == "__main__":
    sys.exit(main())
