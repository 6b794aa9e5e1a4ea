"""Every candidate at every size: time, peak memory and errors, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cjepa_kernels.backends import backends
from cjepa_kernels.bench import candidates, errors, machine, memory
from cjepa_kernels.bench.candidates import BOTH, CHUNKED, COMPILED, FORWARD, MM, OURS, Candidate
from cjepa_kernels.bench.formulas import TEMPERATURE, Formula
from cjepa_kernels.bench.records import Record
from cjepa_kernels.bench.script_options import Progress
from cjepa_kernels.bench.sizes import DTYPES, Size, views
from cjepa_kernels.bench.timing import (
    Run,
    Times,
    clock_of,
    summarise,
    timed_rounds,
)
from cjepa_kernels.bench.verdict import CONFIDENCE, MARGIN, ratio_of, settle
from cjepa_kernels.error_lines import kind_and_first_line

Results = dict[str, Any]
Runs = dict[str, Callable[[str], Run]]  # By name, what makes the call of a direction.

SECTIONS = ("rows", "memory", "errors", "temperatures", "left_out", "missing", "failed")
MEMORY_SHARE = 0.8  # Share of the free memory that a candidate may take.
HOPELESS = 4.0  # A candidate that would take this many times the longest call is not tried.
LARGEST_CHECKED = 16384  # A CPU computes the float64 values of so many rows within seconds.
TEMPERATURES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005)
TEMPERATURES_AT = Size(2048, 256)
QUICK_SIZES = tuple(Size(rows, 256) for rows in (256, 1024, 4096))
FULL_SIZES = tuple(Size(2**power, 256) for power in range(8, 15))
CUDA_SIZES = tuple(Size(2**power, 256) for power in range(8, 18))


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        sizes: M x D, by rising M.
        device: ``"cpu"`` or a CUDA device.
        dtype: Of the views: ``fp32``, ``bf16`` or ``fp16``.
        temperature: The similarities are divided by it.
        seconds: Time for each size and pass.
        patience: Candidates of the same loss are timed for up to ``patience * seconds`` more at a
            size where it is not clear yet whether they are faster or slower than ours.
        least: Least number of times that each candidate is timed.
        longest: Seconds that a call may take. A candidate that takes longer is called once. One
            that would take several times longer, by the size before, is not called.
        compiled: Whether ``torch.compile`` is among the candidates.
        temperatures_at: Size at which errors are measured against the temperature.
        temperatures: The temperatures at which errors are measured.
        shrink_roofs: Divides the sizes of the product and the copy that show the machine's limits.
    """

    sizes: tuple[Size, ...] = FULL_SIZES
    device: str = "cpu"
    dtype: str = "fp32"
    temperature: float = TEMPERATURE
    seconds: float = 3.0
    patience: float = 30.0
    least: int = 3
    longest: float = 6.0
    compiled: bool = True
    temperatures_at: Size = TEMPERATURES_AT
    temperatures: tuple[float, ...] = TEMPERATURES
    shrink_roofs: int = 1


class Comparison:
    """Measures what the settings ask for; ``results`` holds everything measured so far."""

    def __init__(self, settings: Settings, say: Callable[[str], None] = print) -> None:
        self.settings = settings
        self.say = say
        self.progress = Progress(len(settings.sizes) + 2, say)
        self.seconds: dict[str, tuple[int, float]] = {}  # M and seconds of the last size, by name.
        self.results: Results = {
            "environment": {
                **machine.environment(settings.device),
                "backend": candidates.backend_of(settings.device),
                "missing_backend": missing_backend(settings.device),
            },
            "settings": {
                "dtype": settings.dtype,
                "temperature": settings.temperature,
                "seconds": settings.seconds,
                "patience": settings.patience,
                "confidence": CONFIDENCE,
                "margin": MARGIN,
                "sizes": [str(size) for size in settings.sizes],
            },
            "complete": False,
            "roofs": {},
            **{section: [] for section in SECTIONS},
        }

    def run(self, save: Callable[[Results], None] = lambda results: None) -> Results:
        """Measure everything.

        Args:
            save: Called with the results after each size.
        """
        settings = self.settings
        self.progress("products and copies, for the roofs of the roofline")
        self.results["roofs"] = machine.roofs(
            settings.device,
            DTYPES[settings.dtype],
            seconds=settings.seconds,
            shrink=settings.shrink_roofs,
        )
        available = self._find()
        for size in settings.sizes:
            self.progress(f"M={size.rows} D={size.features}")
            self.measure(size, available)
            save(self.results)
        self.progress("errors against the temperature")
        self.sweep_temperatures(available)
        self.results["complete"] = True
        save(self.results)
        return self.results

    def _find(self) -> dict[str, Candidate]:
        """The candidates that work on this machine. The results say how to get the others."""
        settings = self.settings
        available = candidates.on_device(settings.device)
        if not settings.compiled:
            available.pop(COMPILED)
        for name, candidate in list(available.items()):
            try:
                candidates.try_out(
                    candidate, settings.device, DTYPES[settings.dtype], settings.temperature
                )
            except Exception as error:
                how = kind_and_first_line(error)
                self.results["missing"].append({"name": name, "how": how})
                self.say(f"{candidate.title} is left out: {how}")
                del available[name]
        return available

    def measure(self, size: Size, available: dict[str, Candidate]) -> None:
        """Time, memory and errors at one size."""
        settings = self.settings
        inputs = views(size, device=settings.device, dtype=DTYPES[settings.dtype])
        names = [name for name in (MM, *available) if self._fits(name, size)]
        formulas = {
            name: available[name].make(settings.temperature) for name in names if name != MM
        }
        runs: Runs = {
            name: partial(candidates.one_pass, formula, inputs)
            for name, formula in formulas.items()
        }
        if MM in names:
            runs = {MM: partial(candidates.products, inputs), **runs}
        timed = self._time(size, runs)
        formulas = {name: formula for name, formula in formulas.items() if name in timed}
        self._measure_memory(size, list(formulas))
        self._check(size, formulas, available)

    def _fits(self, name: str, size: Size) -> bool:
        """Whether memory and time allow it. If not, the results say what it needs."""
        settings = self.settings
        needed = candidates.bytes_of(name, size, settings.dtype).peak
        beside = 0.0 if name == MM else candidates.bytes_of(MM, size, settings.dtype).peak
        free = machine.free_memory(settings.device)
        bounded = name != MM and candidates.CANDIDATES[name].degree == 1
        reason = None
        if free is not None and not bounded and needed + beside > MEMORY_SHARE * free:
            reason = (
                f"needs {needed / 2**30:.1f} GiB, and at most {100 * MEMORY_SHARE:.0f} % of the "
                f"free {free / 2**30:.1f} GiB may be taken"
            )
        elif name in self.seconds:
            rows, seconds = self.seconds[name]
            degree = max(2, candidates.CANDIDATES[name].degree) if name != MM else 2
            expected = seconds * (size.rows / rows) ** degree
            if expected > HOPELESS * settings.longest:
                reason = f"would take about {expected:.0f} s a call"
        if reason is None:
            return True
        self._leave_out(size, name, reason, needed)
        return False

    def _leave_out(self, size: Size, name: str, reason: str, needed: float) -> None:
        record = {**_cell(size), "name": name, "reason": reason, "needed_bytes": needed}
        self.results["left_out"].append(record)
        self.say(f"  {candidates.TITLES[name]} is left out: {reason}")

    def _fail(self, size: Size, name: str, what: str, error: BaseException) -> None:
        message = kind_and_first_line(error)
        self.results["failed"].append({**_cell(size), "name": name, "what": what, "error": message})
        self.say(f"  {candidates.TITLES[name]} failed ({what}): {message}")

    def _time(self, size: Size, runs: Runs) -> list[str]:
        """Time both passes; returns the names that were timed."""
        settings = self.settings
        clock = clock_of(settings.device)
        for direction in (BOTH, FORWARD):  # The pass that needs more comes first.
            calls = {name: run(direction) for name, run in runs.items()}
            for name in list(calls):
                if not self._try(size, name, direction, calls[name]):
                    del calls[name], runs[name]
            times = timed_rounds(
                calls, seconds=settings.seconds, least=settings.least, clock=clock, warm=True
            )
            if direction == BOTH and OURS in calls:
                self._settle(calls, times)
            summaries = {name: summarise(values) for name, values in times.items()}
            for name, row in summaries.items():
                record = {**_cell(size), "pass": direction, "name": name, **row}
                if direction == BOTH:
                    self.seconds[name] = (size.rows, row["p20"])
                    record["bytes_moved"] = self._moved(name, size)
                    if OURS in times and name != OURS:
                        record["over_ours"] = ratio_of(times[OURS], times[name]).record()
                self.results["rows"].append(record)
            medians = (
                f"{candidates.TITLES[name]} {1e3 * row['median']:.3g}"
                for name, row in summaries.items()
            )
            self.say(f"  {direction}, ms: {', '.join(medians)}")
        return list(runs)

    def _settle(self, calls: dict[str, Run], times: Times) -> None:
        """Time candidates of the same loss further while it is unclear which one is faster."""
        settings = self.settings
        before = {name: len(values) for name, values in times.items()}
        unclear = settle(
            calls,
            times,
            ours=OURS,
            others=[name for name in calls if candidates.is_peer(name)],
            seconds=settings.patience * settings.seconds,
            clock=clock_of(settings.device),
        )
        more = [name for name in times if name != OURS and len(times[name]) > before[name]]
        if more:
            titles = ", ".join(candidates.TITLES[name] for name in more)
            self.say(f"  too noisy or too few at first, so timed further: {titles}")
        if unclear:
            titles = ", ".join(candidates.TITLES[name] for name in unclear)
            self.say(f"  still too noisy to tell: {titles}")

    def _try(self, size: Size, name: str, direction: str, call: Run) -> bool:
        """Whether a call works and is quick enough. If not, the results say why."""
        settings = self.settings
        try:
            start = time.perf_counter()
            call()  # A compiled candidate is compiled in this call.
            seconds = time.perf_counter() - start
            compiles = name == COMPILED or torch.device(settings.device).type == "cuda"
            if (
                compiles or seconds <= 1.5 * settings.longest
            ):  # Otherwise the first call says enough.
                seconds = clock_of(settings.device)(call) if direction == BOTH else 0.0
        except Exception as error:
            self._fail(size, name, direction, error)
            return False
        if direction == BOTH:
            self.seconds[name] = (size.rows, seconds)
        if seconds > settings.longest:
            needed = candidates.bytes_of(name, size, settings.dtype).peak
            self._leave_out(size, name, f"takes {seconds:.1f} s a call", needed)
            return False
        return True

    def _moved(self, name: str, size: Size) -> float | None:
        """Bytes that forward + backward move; None where that is not known."""
        settings = self.settings
        if name in (COMPILED, CHUNKED):
            return None
        if name == OURS and torch.device(settings.device).type == "cpu":
            return candidates.count_on_cpu(name, size, settings.dtype).moved
        return candidates.bytes_of(name, size, settings.dtype).moved

    def _measure_memory(self, size: Size, names: list[str]) -> None:
        settings = self.settings
        if not memory.supported(settings.device):
            return
        for name in names:
            try:
                extra = memory.peak_bytes(
                    name,
                    size,
                    device=settings.device,
                    dtype=settings.dtype,
                    temperature=settings.temperature,
                )
            except RuntimeError as error:
                self._fail(size, name, "memory", error)
                continue
            self.results["memory"].append({**_cell(size), "name": name, "extra_bytes": extra})

    def _check(
        self, size: Size, formulas: dict[str, Formula], available: dict[str, Candidate]
    ) -> None:
        """Errors of loss and gradient against float64."""
        settings = self.settings
        if torch.device(settings.device).type == "cpu" and size.rows > LARGEST_CHECKED:
            return
        same = {name: formula for name, formula in formulas.items() if available[name].same_loss}
        records = self._errors(size, settings.dtype, settings.temperature, same)
        self.results["errors"] += records

    def _errors(
        self, size: Size, dtype: str, temperature: float, formulas: dict[str, Formula]
    ) -> list[Record]:
        inputs = views(size, device=self.settings.device, dtype=DTYPES[dtype])
        anchors = errors.checked_anchors(size.rows)
        truth = errors.exact(*inputs, anchors, temperature=temperature)
        cell = {**_cell(size), "dtype": dtype, "temperature": temperature}
        records = []
        for name, formula in formulas.items():
            try:
                measured = errors.of_formula(formula, inputs, truth, anchors)
            except Exception as error:
                self._fail(size, name, f"{dtype} at temperature {temperature:g}", error)
                continue
            records.append({**cell, "name": name, **measured})
        return records

    def sweep_temperatures(self, available: dict[str, Candidate]) -> None:
        """Errors at every temperature and dtype, without the candidates that are slow to make."""
        size = self.settings.temperatures_at
        same = {
            name: candidate
            for name, candidate in available.items()
            if candidate.same_loss and candidate.degree <= 2 and name != COMPILED
        }
        for dtype in DTYPES:
            for temperature in self.settings.temperatures:
                formulas = {name: one.make(temperature) for name, one in same.items()}
                records = self._errors(size, dtype, temperature, formulas)
                self.results["temperatures"] += records


def _cell(size: Size) -> Record:
    return {"M": size.rows, "D": size.features}


def missing_backend(device: str) -> str | None:
    """Why a device's own kernels are not used, or None if they are."""
    kernels = "triton" if torch.device(device).type == "cuda" else "native"
    status = backends()[kernels]
    return None if status.available else status.reason
