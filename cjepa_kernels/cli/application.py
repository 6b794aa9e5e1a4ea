"""The commands of ``cjepa``: data, train, compare, probe, tune, bench, info.

This module loads with either extra, ``[train]`` or ``[bench]``. A command checks itself for the
other packages that it needs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import cjepa_kernels
from cjepa_kernels.bench.cli import bench
from cjepa_kernels.bench.sizes import DTYPES
from cjepa_kernels.cli.command_errors import Program
from cjepa_kernels.extras import require
from cjepa_kernels.files import check_directory, check_file, write_file
from cjepa_kernels.provenance import TRAINING_LIBRARIES, installed_version
from cjepa_kernels.train.loop.interruption import resumable

# The training program needs these packages, and this file does not.
_NEEDED = ("lightning", "sklearn", "datasets", "pydantic", "yaml", "matplotlib")

app = typer.Typer(
    cls=Program,
    pretty_exceptions_enable=False,
    help="Train and compare hierarchical JEPAs with a contrastive term (C-JEPA).",
)
app.command()(bench)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"cjepa_kernels {cjepa_kernels.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Train and compare hierarchical JEPAs with a contrastive term (C-JEPA)."""


Config = Annotated[Path, typer.Option("--config", help="YAML file of the experiment.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Replace values, as in trainer.epochs=5."),
]
ProbeOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Replace data.*, evaluation.* or trainer.threads, as in evaluation.knn_k=5.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Directory of the results. Default: runs/ and a name made from the "
        "experiment, so that the same command resumes and another one starts afresh.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def train(
    config: Config, overrides: Overrides = None, out: Out = None, debug: Debug = False
) -> None:
    """Train one encoder and evaluate it; a killed run resumes when started again."""
    _require_training()
    from cjepa_kernels.train import runner
    from cjepa_kernels.train.config import config_to_dict, load_config

    experiment = load_config(config, overrides or ())
    run_dir = out or _default_directory(config, config_to_dict(experiment), "")
    check_directory("--out", run_dir)
    console = Console()
    with resumable(run_dir):
        result = runner.train(
            experiment,
            run_dir,
            on_summary=lambda summary: summary.print(console),
            progress_bar=sys.stderr.isatty(),
            epoch_lines=True,
        )
    if not result.evaluation:
        return  # a rank other than the first one
    if not result.trained:
        console.print(
            f"This run was finished before, on {result.finished}; nothing was trained. Another "
            "directory (--out) trains it again.",
            soft_wrap=True,
        )
    console.print(_probe_table(result.evaluation, f"{config.stem}, seed {experiment.seed}"))
    for finding in result.findings:
        console.print(
            f"[yellow]{escape(str(finding['rule']))}[/] (epoch {finding['epoch']}): "
            f"{escape(str(finding['message']))} ({escape(str(finding['evidence']))})"
        )
    console.print(f"{result.seconds:.0f} s; results in {run_dir}", soft_wrap=True)


@app.command()
def data(
    config: Config,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Decode every image and name each damaged one.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Show what the training program understands of the data, without training."""
    _require_training()
    from cjepa_kernels.train.config import load_config
    from cjepa_kernels.train.data.summary import count_patches, inspect_data

    errors = Console(stderr=True, soft_wrap=True)
    experiment = load_config(config, overrides or ())
    inspected = inspect_data(
        experiment,
        verify=verify,
        show_progress=sys.stderr.isatty(),
        on_damage=lambda message: errors.print(message, markup=False, highlight=False),
    )
    if as_json:
        typer.echo(json.dumps(inspected.to_dict(), indent=1))
    else:
        inspected.summary.print(Console())
        if inspected.damage == ():
            typer.echo("Every image can be decoded.")
    if inspected.damage:
        every = inspected.summary.train + inspected.summary.test
        raise ValueError(f"{len(inspected.damage):,} of {every:,} images cannot be decoded")
    count_patches(experiment, inspected.dataset)  # the summary has no patches if they do not fit


@app.command()
def tune(
    rows: Annotated[
        int,
        typer.Option(
            min=2,
            help="M = 2B, the number of rows of both views together; as many rows of predictions.",
        ),
    ] = 65536,
    features: Annotated[int, typer.Option(min=1, help="D, the features of a row.")] = 256,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    debug: Debug = False,
) -> None:
    """Choose how the Triton kernels are compiled for one size by timing them on this GPU."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(sorted(DTYPES))}, got {dtype!r}")
    if not torch.cuda.is_available():
        raise ValueError("tune needs an NVIDIA GPU, and PyTorch finds no CUDA device here")
    from cjepa_kernels import tune as tuning
    from cjepa_kernels.triton import configs

    check_file("the file of tuned choices", configs.cache_file())
    earlier = configs.read(configs.cache_file())  # an unusable file is an error before any work
    console = Console()
    chosen = []
    for entries_for, make_measure in (
        (tuning.entries_for, tuning.measure_step),
        (tuning.prediction_entries, tuning.measure_prediction),
    ):
        entries = entries_for(features, DTYPES[dtype])
        measure = make_measure(rows, features, DTYPES[dtype])
        chosen += tuning.tune(entries, measure, console.print)
    others = [entry for entry in earlier if not tuning.replaces(chosen, entry)]
    configs.write(configs.cache_file(), [*chosen, *others])
    console.print(f"written to {configs.cache_file()}", soft_wrap=True)


@app.command()
def compare(
    config: Config,
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    out: Out = None,
    workers: Annotated[
        int | None, typer.Option(help="Parallel processes. Default: 2, or 1 on a single core.")
    ] = None,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Pretrain on half of the classes, probe the others.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Compare C-JEPA, JEPA alone and the contrastive term alone on the same seeds."""
    _require_training()
    from cjepa_kernels.train.compare import compare as run_comparison
    from cjepa_kernels.train.config import config_to_dict, load_config

    experiment = load_config(config, overrides or ())
    seed_list = _parse_seeds(seeds)
    task = {**config_to_dict(experiment), "seeds": seed_list, "transfer": transfer}
    out_dir = out or _default_directory(config, task, "-compare")
    check_directory("--out", out_dir)
    with resumable(out_dir):
        run_comparison(
            experiment,
            seeds=seed_list,
            out_dir=out_dir,
            workers=workers,
            transfer=transfer,
            console=Console(),
        )


@app.command()
def probe(
    checkpoint: Annotated[
        Path, typer.Argument(help="A .ckpt file, or the directory of a run.", show_default=False)
    ],
    overrides: ProbeOverrides = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers to this file.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Probe the target encoder of a checkpoint, on its experiment's data or on other data."""
    _require_training()
    from cjepa_kernels.train import runner
    from cjepa_kernels.train.config import apply_overrides, config_to_dict
    from cjepa_kernels.train.data.dataset import load_dataset, resolve_pretrain_classes
    from cjepa_kernels.train.evaluation.probes import evaluate

    _check_probe_overrides(overrides or ())
    if json_file is not None:
        check_file("--json", json_file)
    extract, experiment = runner.load_encoder(checkpoint)
    experiment = apply_overrides(experiment, overrides or ())
    if experiment.trainer.threads is not None:
        torch.set_num_threads(experiment.trainer.threads)
    dataset = load_dataset(experiment.data)
    numbers = evaluate(
        extract,
        dataset,
        experiment.evaluation,
        pretrain_classes=resolve_pretrain_classes(experiment.data, dataset),
    )
    images = len(dataset.test.labels)
    title = f"{checkpoint} on {dataset.name}, {images:,} test images"
    Console().print(_probe_table(numbers, title))
    if json_file is not None:
        content = {
            "checkpoint": str(checkpoint),
            "data": config_to_dict(experiment)["data"],
            "test_images": images,
            "evaluation": numbers,
        }
        write_file(json_file, json.dumps(content, indent=1) + "\n")


@app.command()
def info(debug: Debug = False) -> None:
    """Show versions, devices, back ends and the compiled module."""
    console = Console()
    console.print(_version_table())
    table = Table("back end", "available", "devices", "what it is, or why it is missing")
    for name, status in cjepa_kernels.backends().items():
        available = "[green]yes[/]" if status.available else "no"
        table.add_row(name, available, ", ".join(status.devices), escape(status.reason))
    console.print(table)
    console.print(_compiled_module())


def _version_table() -> Table:
    table = Table(show_header=False)
    table.add_row("cjepa_kernels", cjepa_kernels.__version__)
    table.add_row("Python", f"{platform.python_version()} on {platform.platform()}")
    for name in (*TRAINING_LIBRARIES, "datasets"):
        table.add_row(name, installed_version(name) or "not installed")
    table.add_row("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} PyTorch threads")
    for index in range(torch.cuda.device_count()):
        table.add_row(f"GPU {index}", torch.cuda.get_device_name(index))
    if not torch.cuda.is_available():
        table.add_row("GPU", "none that PyTorch can use")
    if torch.backends.mps.is_available():
        table.add_row("MPS", "available")
    return table


def _compiled_module() -> Table:
    from cjepa_kernels.backends import compiled_module

    table = Table(title="compiled module cjepa_kernels._C", show_header=False)
    module = compiled_module()
    if module is None:
        table.add_row("status", "not built")
    else:
        for key, value in module.build_info().items():
            table.add_row(str(key), escape(str(value)))
    return table


def _probe_table(numbers: dict[str, float], title: str) -> Table:
    from cjepa_kernels.train.evaluation.comparison import (
        MAIN_METRICS,
        METRIC_TITLES,
        TRANSFER_METRICS,
    )

    table = Table(title=escape(title))
    table.add_column("metric")
    table.add_column("mean of patches", justify="right")
    table.add_column("CLS", justify="right")
    rows = {
        **{metric: f"{METRIC_TITLES[metric]} probe, %" for metric in MAIN_METRICS},
        "std": "standard deviation",
        "effective_rank": "effective rank",
        **{metric: f"transfer: {METRIC_TITLES[metric]} probe, %" for metric in TRANSFER_METRICS},
    }
    for key, label in rows.items():
        if f"mean/{key}" in numbers:
            table.add_row(label, f"{numbers[f'mean/{key}']:.2f}", f"{numbers[f'cls/{key}']:.2f}")
    if "mean/linear_robust" in numbers:
        table.caption = "The robust probe is the linear probe on corrupted images."
    return table


def _default_directory(config: Path, task: Mapping[str, Any], suffix: str) -> Path:
    content = json.dumps(task, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return Path("runs") / f"{config.stem}{suffix}-{digest}"


def _check_probe_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key.partition(".")[0] not in ("data", "evaluation") and key != "trainer.threads":
            raise ValueError(
                "a probe takes data.*, evaluation.* and trainer.threads alone, because the rest "
                f"belongs to the trained checkpoint; got {override!r}"
            )


def _parse_seeds(text: str) -> Sequence[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds: expected integers such as 0,1,2, got {text!r}") from None


def _require_training() -> None:
    for module in _NEEDED:
        require(module, extra="train")
