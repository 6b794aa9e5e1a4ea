"""Time, memory and errors of the losses beside NT-Xent, and of what they are compared with.

The candidates of a loss take turns, and each round gives the ratio of our time to another's; the
ratio of a record is their median, with its 99 % interval (verdict.py). Errors are those against the
plain formula in float64. A candidate that needs too much memory or too long is not run, and the
record says why. bench/losses.py records the results, and ``cjepa bench --losses`` shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cjepa_kernels.bench import candidates, machine, memory, tensor_bytes
from cjepa_kernels.bench.candidates import BOTH, Candidate
from cjepa_kernels.bench.errors import relative_error
from cjepa_kernels.bench.formulas import TEMPERATURE, Formula
from cjepa_kernels.bench.losses import COMPARED, LOSSES, Loss
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.sizes import DTYPES, Size, views
from cjepa_kernels.bench.targets import Target
from cjepa_kernels.bench.timing import Run, host_clock, summarise, timed_rounds
from cjepa_kernels.bench.verdict import MIN_ROUNDS, ratio_of
from cjepa_kernels.error_lines import kind_and_first_line
from cjepa_kernels.tables import mebibytes, milliseconds, print_table

FEATURES, DTYPE = COMPARED.features, "fp32"
MEMORY_SHARE = 0.8  # Share of the free memory that a candidate may take.
LONGEST = 12.0  # Seconds that a call of another candidate may take where there is no target for it.
LARGEST_CHECKED = 8192  # Rows at which the float64 values take seconds.
ALONE = 3  # Rounds of a loss that is timed without others.


def needed_bytes(candidate: Candidate, size: Size) -> float:
    """Bytes that forward + backward hold at once, scaled up from a small size."""
    formula = candidate.make(TEMPERATURE)  # any temperature
    return tensor_bytes.scaled(formula, size, DTYPES[DTYPE], degree=candidate.degree).peak


def reason_not_to_try(candidate: Candidate, size: Size, expected: float) -> str | None:
    """Why a candidate is not run at a size, or None if it is.

    Args:
        candidate: Ours has memory that grows with the batch, and always runs.
        size: Of both views together.
        expected: Seconds of a call, by the rows before; 0 if they do not matter.
    """
    if candidate.degree == 1:
        return None
    needed, free = needed_bytes(candidate, size), machine.free_memory()
    if free is not None and needed > MEMORY_SHARE * free:
        return (
            f"needs {needed / 2**30:.1f} GiB, and at most {100 * MEMORY_SHARE:.0f} % of the free "
            f"{free / 2**30:.1f} GiB may be taken"
        )
    return f"would take about {expected:.0f} s a call" if expected > LONGEST else None


def value_and_gradients(formula: Formula, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss (), and the gradients of both views as (2B, D)."""
    loss = formula(*inputs)
    return loss.detach(), torch.cat(torch.autograd.grad(loss, inputs))


def exact_values(
    loss: Loss, inputs: tuple[Tensor, Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """The same by the plain formula in float64."""
    formula = loss.candidates()[loss.exact].make(temperature)
    z_i, z_j = (z.detach().double().requires_grad_() for z in inputs)
    return value_and_gradients(formula, (z_i, z_j))


class Measurement:
    """Measures losses at rising numbers of rows, on the CPU in fp32.

    Args:
        seconds: Time for each loss and size.
        say: Takes lines about what is not measured.
        temperature: The similarities are divided by it.

    Attributes:
        sections: The sections of a results file, as far as they are measured.
    """

    def __init__(
        self,
        seconds: float,
        say: Callable[[str], None] = print,
        *,
        temperature: float = TEMPERATURE,
    ) -> None:
        self.seconds, self.say, self.temperature = seconds, say, temperature
        self.calls: dict[tuple[str, str], tuple[int, float]] = {}  # Rows and seconds of the last.
        self.sections: dict[str, list[Record]] = {
            name: [] for name in ("rows", "memory", "errors", "left_out", "products")
        }

    def measure(self, name: str, rows: int, features: int = FEATURES) -> None:
        """Time, memory and errors of a loss and of what it is compared with."""
        loss = LOSSES[name]
        size = loss.size(rows, features)
        cell = {"loss": name, "M": rows, "D": features}
        inputs = views(size, dtype=DTYPES[DTYPE])
        formulas = self._first_calls(cell, loss, size, inputs)
        self._time(cell, loss, formulas, inputs)
        if loss.limits and (rows, features) == COMPARED:
            self._time_products(cell, loss)
        self._measure_memory(cell, list(formulas), size)
        if rows <= LARGEST_CHECKED:
            self._check(cell, loss, formulas, inputs)

    def _first_calls(
        self, cell: Record, loss: Loss, size: Size, inputs: tuple[Tensor, Tensor]
    ) -> dict[str, Formula]:
        """Call every candidate once, and return those that are timed."""
        formulas = {}
        for name, candidate in loss.candidates().items():
            rows, seconds = self.calls.get((cell["loss"], name), (cell["M"], 0.0))
            try:
                formula = candidate.make(self.temperature)
                expected = seconds * (cell["M"] / rows) ** 2
                has_target = name in loss.limits and (cell["M"], cell["D"]) == COMPARED
                patient = has_target or candidate is loss.ours
                reason = reason_not_to_try(candidate, size, 0.0 if patient else expected)
                if reason is None:
                    seconds = host_clock(candidates.one_pass(formula, inputs, BOTH))
                    self.calls[cell["loss"], name] = (cell["M"], seconds)
                    if seconds > LONGEST and not patient:
                        reason = f"takes {seconds:.0f} s a call"
            except (ImportError, RuntimeError) as error:
                reason = kind_and_first_line(error)
            if reason is None:
                formulas[name] = formula
            else:
                self.sections["left_out"].append({**cell, "name": name, "reason": reason})
                self.say(f"  {candidate.title} is not run: {reason}")
        return formulas

    def _time(
        self, cell: Record, loss: Loss, formulas: dict[str, Formula], inputs: tuple[Tensor, Tensor]
    ) -> None:
        """Rounds in which the candidates take turns, and the ratios of our time to the others'."""
        calls: dict[str, Run] = {
            name: candidates.one_pass(formula, inputs, BOTH) for name, formula in formulas.items()
        }
        least = MIN_ROUNDS if len(calls) > 1 else ALONE
        times = timed_rounds(calls, seconds=self.seconds, least=least, warm=True)
        ours = loss.ours.name
        for name, values in times.items():
            row = {**cell, "pass": BOTH, "name": name, **summarise(values)}
            self.calls[cell["loss"], name] = (cell["M"], row["p20"])  # The first call took longer.
            if name != ours and ours in times:
                row["ours_over_it"] = ratio_of(values, times[ours]).record()
            self.sections["rows"].append(row)

    def _time_products(self, cell: Record, loss: Loss) -> None:
        """The time of the matrix products at the rate of a large one, measured at this moment."""
        rate = machine.roofs("cpu", DTYPES[DTYPE])["flops"]
        flops = loss.products * cell["M"] ** 2 * cell["D"]
        row = {"flops": flops, "flops_per_second": rate, "seconds": flops / rate}
        self.sections["products"].append({**cell, **row})

    def _measure_memory(self, cell: Record, names: list[str], size: Size) -> None:
        for name in names if memory.supported("cpu") else []:
            try:
                extra = memory.peak_bytes(
                    name, size, device="cpu", dtype=DTYPE, temperature=self.temperature
                )
            except RuntimeError as error:
                self.say(f"  the memory of {name} is not known: {error}")
                continue
            self.sections["memory"].append({**cell, "name": name, "extra_bytes": extra})

    def _check(
        self, cell: Record, loss: Loss, formulas: dict[str, Formula], inputs: tuple[Tensor, Tensor]
    ) -> None:
        """Errors of the candidates that compute this loss, not another one."""
        truth = exact_values(loss, inputs, self.temperature)
        for name, formula in formulas.items():
            if name == candidates.OURS:  # NT-Xent without labels, beside NT-Xent with labels.
                continue
            pairs = zip(value_and_gradients(formula, inputs), truth, strict=True)
            of_loss, of_gradient = (relative_error(actual, exact) for actual, exact in pairs)
            errors = {"error_of_loss": of_loss, "error_of_gradient": of_gradient}
            self.sections["errors"].append({**cell, "name": name, **errors})


def targets_of(sections: dict[str, list[Record]]) -> list[Target]:
    """Our time over that of every other candidate, with the targets."""
    targets = []
    for row in sections["rows"]:
        if "ours_over_it" in row:
            loss = LOSSES[row["loss"]]
            at_target = (row["M"], row["D"]) == COMPARED
            limit = loss.limits.get(row["name"]) if at_target else None
            cell = {key: row[key] for key in ("loss", "M", "D")}
            cell |= {"ours": loss.ours.name, "other": row["name"]}
            targets.append(Target(cell, row["ours_over_it"]["value"], limit))
    for row in sections["left_out"]:
        limit = LOSSES[row["loss"]].limits.get(row["name"])
        if limit is not None and (row["M"], row["D"]) == COMPARED:
            cell = {key: row[key] for key in ("loss", "M", "D")}
            cell |= {"ours": LOSSES[row["loss"]].ours.name, "other": row["name"]}
            targets.append(Target(cell, None, limit))
    return targets


def print_rows(sections: dict[str, list[Record]]) -> None:
    """Print time, memory and errors of every candidate."""

    def ratio(row: Record) -> str:
        """Our time over that of the row, with its interval."""
        of = row.get("ours_over_it")
        if of is None:
            return ""
        interval = "" if of["low"] is None else f" ({of['low']:.2f} to {of['high']:.2f})"
        return f"{of['value']:.2f}{interval}"

    def found(section: str, row: Record, key: str) -> Any:
        same = ("loss", "M", "D", "name")
        for other in sections[section]:
            if all(other[name] == row[name] for name in same):
                return other[key]
        return None

    lines = []
    for row in sections["rows"]:
        extra = found("memory", row, "extra_bytes")
        errors = (found("errors", row, f"error_of_{what}") for what in ("loss", "gradient"))
        lines.append(
            [
                row["loss"],
                str(row["M"]),
                LOSSES[row["loss"]].candidates()[row["name"]].title,
                *(milliseconds(row[key]) for key in ("median", "p20", "p80")),
                f"{row['rounds']:.0f}",
                ratio(row),
                "" if extra is None else mebibytes(extra),
                *("" if error is None else f"{error:.1e}" for error in errors),
            ]
        )
    heads = ["loss", "M", "candidate", "ms", "p20", "p80", "rounds", "ours / this (99 %)"]
    heads += ["MiB", "error", "of gradient"]
    print_table(heads, lines)
