"""The command ``cjepa bench``: its options, its progress, its tables and its files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cjepa_kernels.bench import machine, report
from cjepa_kernels.bench.comparison import (
    CUDA_SIZES,
    QUICK_SIZES,
    Comparison,
    Results,
    Settings,
    missing_backend,
)
from cjepa_kernels.bench.formulas import TEMPERATURE
from cjepa_kernels.bench.loss_comparison import DTYPE, Measurement, print_rows
from cjepa_kernels.bench.losses import LOSSES, parse_losses
from cjepa_kernels.bench.records import as_json
from cjepa_kernels.bench.script_options import Progress
from cjepa_kernels.bench.sizes import DTYPES, Size, parse_sizes
from cjepa_kernels.extras import require
from cjepa_kernels.files import atomic_write, check_directory

QUICK = Settings(
    sizes=QUICK_SIZES,
    seconds=0.7,
    longest=4.0,
    compiled=False,
    temperatures_at=Size(512, 256),
    temperatures=(0.5, 0.1, 0.05, 0.02, 0.01),
    shrink_roofs=2,
)
LOSS_SIZES = (Size(2048, 256), Size(8192, 256))
QUICK_LOSS_SIZES = (Size(512, 256), Size(2048, 256))
OUT = Path("cjepa-bench")
PLOTS = ("time", "memory", "roofline", "temperature")  # As in plots.py, which needs matplotlib.
# The columns of the page's table that fit into a terminal of 80 columns, and their titles there.
COLUMNS = {
    "loss": "loss",
    "forward ms": "fwd, ms",
    "forward + backward ms": "both, ms",
    "time / ours": "/ ours",
    "99 % interval": "99 % interval",
    "memory MiB": "MiB",
    "gradient error": "error",
}


def bench(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Three sizes, no torch.compile: about a minute on two cores."),
    ] = False,
    sizes: Annotated[
        str | None, typer.Option(help="MxD, separated by commas, as in 2048x256,8192x256.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the inputs: fp32, bf16 or fp16.")] = "fp32",
    temperature: Annotated[float, typer.Option(help="Divisor of the similarities.")] = TEMPERATURE,
    seconds: Annotated[
        float | None, typer.Option(help="Seconds of timing for each size and pass. Default: 3.")
    ] = None,
    losses: Annotated[
        str | None,
        typer.Option(
            help="Losses that are compared in place of NT-Xent, separated by commas: "
            f"{', '.join(LOSSES)}. On the CPU, in fp32."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Directory for results.json, results.md and the plots.")
    ] = OUT,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Compare the loss with other formulas on this machine: time, peak memory and errors."""
    if losses is not None and device is None:
        device = "cpu"
    settings = make_settings(
        quick=quick,
        sizes=sizes,
        device=device,
        dtype=dtype,
        temperature=temperature,
        seconds=seconds,
    )
    if losses is not None:
        names = loss_names(losses, settings)
        if sizes is None:
            settings = replace(settings, sizes=QUICK_LOSS_SIZES if quick else LOSS_SIZES)
        check_directory("--out", out)
        out.mkdir(parents=True, exist_ok=True)
        run_losses(names, settings, out)
        return
    prepare(out)
    run(settings, out, Console(soft_wrap=True, highlight=False))


def loss_names(losses: str, settings: Settings) -> list[str]:
    """The names that ``--losses`` holds.

    Raises:
        ValueError: One of them is wrong, or the device or the dtype is not theirs.
    """
    try:
        names = parse_losses(losses)
    except ValueError as error:
        raise ValueError(f"--losses: {error}") from None
    for option, given, only in (
        ("device", settings.device, "cpu"),
        ("dtype", settings.dtype, DTYPE),
    ):
        if given != only:
            raise ValueError(f"--{option}: expected {only} with --losses, got {given!r}")
    return names


def run_losses(names: list[str], settings: Settings, out: Path) -> None:
    """Measure and print other losses, and write ``losses.json`` after each size."""
    measurement = Measurement(settings.seconds, temperature=settings.temperature)
    missing = missing_backend(settings.device)
    if missing is not None:
        print(f"the compiled kernels are missing, so the chunked back end is timed: {missing}")
    progress = Progress(len(names) * len(settings.sizes))
    about = {
        "environment": machine.environment(settings.device),
        "settings": {
            "dtype": settings.dtype,
            "temperature": settings.temperature,
            "seconds": settings.seconds,
        },
    }
    path = out / "losses.json"
    for name in names:
        for size in settings.sizes:
            progress(f"{name} M={size.rows} D={size.features}")
            measurement.measure(name, size.rows, size.features)
            atomic_write(path, as_json({**about, **measurement.sections}))
    print_rows(measurement.sections)
    print(f"written: {path}")


def prepare(out: Path) -> None:
    """Make the directory of the results, without the plots of an earlier run.

    Raises:
        ValueError: It cannot be written to.
    """
    check_directory("--out", out)
    out.mkdir(parents=True, exist_ok=True)
    for name in PLOTS:
        for path in (out / f"{name}.png", out / f"{name}-dark.png"):
            path.unlink(missing_ok=True)


def make_settings(
    *,
    quick: bool = False,
    sizes: str | None = None,
    device: str | None = None,
    dtype: str = "fp32",
    temperature: float = TEMPERATURE,
    seconds: float | None = None,
) -> Settings:
    """Settings from the options.

    Raises:
        ValueError: An option is wrong; the message names it, what was expected and what came.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"--temperature: expected a positive number, got {temperature:g}")
    if seconds is not None and not 0 <= seconds < float("inf"):
        raise ValueError(f"--seconds: expected 0 or more, got {seconds:g}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {device!r}")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device: there is no CUDA device here, got {device!r}")
        number = torch.device(device).index or 0
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"--device: there are {torch.cuda.device_count()} CUDA devices, got {device!r}"
            )
        torch.cuda.set_device(number)
    settings = QUICK if quick else Settings()
    if kind == "cuda" and not quick:
        settings = replace(settings, sizes=CUDA_SIZES, longest=2.0)
    settings = replace(settings, device=device, dtype=dtype, temperature=temperature)
    if seconds is not None:
        settings = replace(settings, seconds=seconds)
    if sizes is not None:
        try:
            settings = replace(settings, sizes=tuple(sorted(parse_sizes(sizes))))
        except ValueError as error:
            raise ValueError(f"--sizes: {error}") from None
    return settings


def run(settings: Settings, out: Path, console: Console) -> Results:
    """Measure, print and write. The files are written after each size."""
    comparison = Comparison(settings, say=lambda text: console.print(escape(text)))
    results = comparison.run(save=lambda results: save(results, out))
    for size in report.sizes_of(results):
        console.print(size_table(results, size))
        if reasons := report.left_out(results, size):
            console.print(escape(f"not measured: {reasons}"))
    if any(" *" in cells[1] for cells in report.table(results)):
        console.print("* another loss of the same M x M matrix")
    for sentence in report.verdict(results):
        console.print(f"[bold]{escape(sentence)}[/]")
    written = write_plots(results, out, console)
    console.print(f"written: {out}/results.json, results.md{written}")
    return results


def size_table(results: Results, size: Size) -> Table:
    """The table of one size for a terminal."""
    title = f"M = {size.rows}, D = {size.features}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for key, name in COLUMNS.items():
        table.add_column(name, justify="left" if key == "loss" else "right", no_wrap=True)
    for cells in report.of_size(results, size):
        of_key = dict(zip(report.HEADER, cells, strict=True))
        table.add_row(*(escape(of_key[key]) for key in COLUMNS))
    return table


def save(results: Results, out: Path) -> None:
    """Write the results and their page, each in one piece."""
    atomic_write(out / "results.json", as_json(results))
    atomic_write(out / "results.md", report.markdown(results))


def write_plots(results: Results, out: Path, console: Console) -> str:
    """Write the plots and return what to say of them."""
    try:
        require("matplotlib", extra="bench")
        from cjepa_kernels.bench import plots
    except ImportError as error:
        console.print(escape(f"no plots: {error}"))
        return ""
    return f" and {len(plots.write_all_pngs(results, out))} plots"
