"""Train the arms of a comparison on the same seeds and set the results side by side."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence, Set
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from threadpoolctl import threadpool_limits

from cjepa_kernels.files import atomic_write
from cjepa_kernels.provenance import TRAINING_LIBRARIES, commit, cpu_name, installed_version
from cjepa_kernels.suggestions import nearest
from cjepa_kernels.train import checksummed_json, runner
from cjepa_kernels.train.config import ExperimentConfig, config_from_dict, config_to_dict
from cjepa_kernels.train.data.dataset import Dataset, load_dataset, resolve_pretrain_classes
from cjepa_kernels.train.data.fingerprint import check_fingerprint, fingerprint
from cjepa_kernels.train.data.summary import summarize
from cjepa_kernels.train.evaluation.comparison import (
    PAIRS,
    ArmRun,
    Comparison,
    paired_differences,
    save_comparison,
)
from cjepa_kernels.train.evaluation.probes import (
    check_dataset,
    evaluate,
    evaluate_pixels,
    probe_sizes,
)
from cjepa_kernels.train.loop.comparison_progress import progress_display
from cjepa_kernels.train.loop.directory_lock import DirectoryLock
from cjepa_kernels.train.loop.run_directory import (
    RunResult,
    check_run_directory,
    load_result,
)
from cjepa_kernels.train.loop.run_files import RESULT
from cjepa_kernels.train.loop.worker_pool import Job, ReportProgress, run_jobs
from cjepa_kernels.train.report.page import write_report
from cjepa_kernels.train.report.tables import (
    comparison_markdown,
    notes_of,
    rich_tables,
    text_tables,
)

ARMS: dict[str, dict[str, float]] = {
    "cjepa": {},
    "jepa": {"contrastive_weight": 0.0},
    "contrastive": {"jepa_weight": 0.0},
}
"""What each arm replaces in the experiment's loss section. AdamW divides out a common factor of
the gradient, so the contrastive arm keeps its weight; gradient clipping then binds less."""


def arm_config(
    config: ExperimentConfig, arm: str, seed: int, *, transfer: bool = False
) -> ExperimentConfig:
    """The experiment of one run: the comparison's, with the arm's loss and the seed.

    Args:
        config: The comparison's experiment.
        arm: ``"cjepa"``, ``"jepa"`` or ``"contrastive"``.
        seed: Seed of initialisation, data order, views and masks.
        transfer: Leave half of the classes out of pretraining, unless the experiment says which.

    Raises:
        ValueError: If the arm is unknown or the result is no valid experiment.
    """
    if arm not in ARMS:
        raise ValueError(f"arms: no arm {arm!r}{nearest(arm, ARMS)}")
    values = config_to_dict(config)
    values["seed"] = seed
    values["loss"] = {**values["loss"], **ARMS[arm]}
    if transfer and values["data"]["pretrain_classes"] is None:
        values["data"]["pretrain_classes"] = "half"
    return config_from_dict(values, origin=f"the configuration of {arm}")


def compare(
    config: ExperimentConfig,
    *,
    seeds: Sequence[int],
    out_dir: Path,
    arms: Sequence[str] = ("cjepa", "jepa", "contrastive"),
    workers: int | None = None,
    transfer: bool = False,
    console: Console | None = None,
) -> Comparison:
    """Train every arm with every seed, print the tables and write JSON, Markdown and a report.

    The arms of one seed share initialisation, data order, views, masks and budget. A comparison
    that was killed and is started again keeps its finished runs and resumes the others. A result
    does not depend on ``workers``.

    Args:
        config: The experiment; each arm replaces a part of its loss section.
        seeds: Distinct seeds, at least one.
        out_dir: Receives ``comparison.json``, ``comparison.md``, ``report.html`` and the runs.
        arms: Some of ``"cjepa"``, ``"jepa"`` and ``"contrastive"``.
        workers: Parallel processes. Default: 2, or 1 on a single core.
        transfer: Pretrain on half of the classes and probe the others too.
        console: Where progress and tables go. Default: the standard output.

    Returns:
        The comparison.

    Raises:
        ValueError: If an argument or the experiment is not valid, before anything is trained, or
            if ``out_dir`` holds runs of a different configuration.
        JobError: If a run fails otherwise; the message names it.
    """
    arms, seeds, out_dir = tuple(arms), tuple(seeds), Path(out_dir)
    _check_arguments(config, arms, seeds, workers)
    with DirectoryLock(out_dir) as lock:
        return _compare(
            config,
            seeds=seeds,
            out_dir=out_dir,
            arms=arms,
            workers=min(2, os.cpu_count() or 1) if workers is None else workers,
            transfer=transfer,
            console=console or Console(),
            lock=lock,
        )


def _compare(
    config: ExperimentConfig,
    *,
    seeds: tuple[int, ...],
    out_dir: Path,
    arms: tuple[str, ...],
    workers: int,
    transfer: bool,
    console: Console,
    lock: DirectoryLock,
) -> Comparison:
    configs = {
        (arm, seed): arm_config(config, arm, seed, transfer=transfer)
        for seed in seeds
        for arm in arms
    }
    base = {seed: arm_config(config, "cjepa", seed, transfer=transfer) for seed in seeds}
    dataset = load_dataset(base[seeds[0]].data)
    data = fingerprint(dataset)
    finished: dict[str, RunResult] = {}
    for (arm, seed), run_config in configs.items():
        run_dir = out_dir / "runs" / _run_name(arm, seed)
        check_run_directory(run_config, run_dir)
        runner.check_against_data(run_config, dataset)
        if (run_dir / RESULT).is_file():
            finished[run_dir.name] = _finished_run(run_dir, data, out_dir)
        else:
            runner.completed_steps(run_dir, run_config, data)
    pretrain_classes = resolve_pretrain_classes(base[seeds[0]].data, dataset)
    check_dataset(dataset, pretrain_classes)
    summary = summarize(base[seeds[0]], dataset)
    summary.print(console)
    if finished:
        last = max(result.finished for result in finished.values())
        console.print(
            f"{len(finished)} of {len(configs)} runs were finished before, the last one on {last}; "
            "they are not trained again.",
            highlight=False,
            soft_wrap=True,
        )

    lock.acquire()
    jobs = [
        Job(_run_name(arm, seed), _train_job, (run_config, out_dir / "runs" / _run_name(arm, seed)))
        for (arm, seed), run_config in configs.items()
        if _run_name(arm, seed) not in finished
    ]
    baselines = [("pixels", "pixels", base[seeds[0]])]
    baselines += [("untrained", _run_name("untrained", seed), base[seed]) for seed in seeds]
    for baseline, name, run_config in baselines:
        path = out_dir / "baselines" / f"{name}.json"
        jobs.append(Job(name, _baseline_job, (run_config, path, data, baseline)))
    with progress_display(console, len(jobs)) as on_event:
        results = finished | run_jobs(jobs, workers, on_event, out_dir / "logs")

    runs = []
    for arm, seed in configs:
        result: RunResult = results[_run_name(arm, seed)]
        runs.append(
            ArmRun(
                arm=arm,
                seed=seed,
                directory=f"runs/{_run_name(arm, seed)}",
                history=result.history,
                evaluation=result.evaluation,
                findings=result.findings,
                seconds=result.seconds,
            )
        )
    by_arm = {arm: [run.evaluation for run in runs if run.arm == arm] for arm in arms}
    comparison = Comparison(
        dataset=dataset.name,
        arms=arms,
        seeds=seeds,
        transfer=transfer,
        config=config_to_dict(base[seeds[0]]),
        runs=runs,
        baselines={
            "pixels": [results["pixels"]],
            "untrained": [results[_run_name("untrained", seed)] for seed in seeds],
        },
        paired={
            f"{first} - {second}": paired_differences(by_arm[first], by_arm[second])
            for first, second in PAIRS
            if first in arms and second in arms
        },
        environment=_recorded_environment(config, out_dir, list(results)),
        data=summary,
        probes={"all": probe_sizes(dataset, config.evaluation)}
        | (
            {"transfer": probe_sizes(dataset, config.evaluation, pretrain_classes)}
            if pretrain_classes is not None
            else {}
        ),
    )
    _publish(comparison, dataset=dataset, configs=configs, out_dir=out_dir, console=console)
    return comparison


def _check_arguments(
    config: ExperimentConfig, arms: Sequence[str], seeds: Sequence[int], workers: int | None
) -> None:
    for name, values in (("arms", arms), ("seeds", seeds)):
        if not values:
            raise ValueError(f"{name} must hold at least one, got none")
        if len(set(values)) != len(values):
            raise ValueError(f"{name} must be distinct, got {', '.join(map(str, values))}")
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"seeds must be integers >= 0, got {seed!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if config.trainer.devices > 1:
        raise ValueError(
            "trainer.devices must be 1 in a comparison, which runs its arms in parallel processes, "
            f"got {config.trainer.devices}"
        )
    kind = str(config.loss.get("type", "cjepa")).lower()
    if kind not in ("cjepa", "contrastive_jepa") and not config.loss.get("use_contrastive", False):
        raise ValueError(
            "loss.type must be cjepa, or loss.use_contrastive true, in a comparison, whose arms "
            f"switch the terms off themselves, got type {kind!r} without use_contrastive"
        )
    for key in ("contrastive_weight", "jepa_weight"):
        value = config.loss.get(key)
        if isinstance(value, int | float) and value == 0:
            raise ValueError(
                f"loss.{key} must be above 0 in a comparison, whose arms set it to 0 themselves, "
                f"got {value}"
            )


def _finished_run(run_dir: Path, data: str, out_dir: Path) -> RunResult:
    result = load_result(run_dir)
    check_fingerprint(
        result.data,
        data,
        origin=str(run_dir / RESULT),
        remedy=runner.start_again(out_dir),
    )
    return result


def _run_name(arm: str, seed: int) -> str:
    return f"{arm}-seed{seed}"


def _train_job(config: ExperimentConfig, run_dir: Path, report: ReportProgress) -> RunResult:
    return runner.train(
        config,
        run_dir,
        on_progress=lambda progress: report(progress.step, progress.total_steps),
        progress_bar=False,
    )


def _baseline_job(
    config: ExperimentConfig, path: Path, data: str, baseline: str, report: ReportProgress
) -> dict[str, float]:
    """The evaluation in a file if it is of this experiment and these data, or a new one."""
    key = {"config": config_to_dict(config), "data": data}
    saved = _verified(path)
    if saved is not None and {name: saved.get(name) for name in key} == key:
        return dict(saved["evaluation"])
    dataset = load_dataset(config.data, show_progress=False)
    classes = resolve_pretrain_classes(config.data, dataset)
    with threadpool_limits(limits=config.trainer.threads):
        if baseline == "pixels":
            evaluation = evaluate_pixels(dataset, config.evaluation, pretrain_classes=classes)
        else:
            encoder = runner.untrained_encoder(config, dataset)
            evaluation = evaluate(encoder, dataset, config.evaluation, pretrain_classes=classes)
    atomic_write(path, checksummed_json.encode({**key, "evaluation": evaluation}))
    return evaluation


def _verified(path: Path, first_format: Set[str] = frozenset()) -> dict[str, Any] | None:
    """A document that can be made again; None if it is absent or damaged.

    ``first_format`` has the keys of such a document as earlier versions wrote it, without checksum.
    """
    try:
        document, verified = checksummed_json.decode(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return document if verified or document.keys() == first_format else None


def _publish(
    comparison: Comparison,
    dataset: Dataset,
    configs: Mapping[tuple[str, int], ExperimentConfig],
    out_dir: Path,
    console: Console,
) -> None:
    console.print("drawing the report", style="dim")
    save_comparison(comparison, out_dir / "comparison.json")
    atomic_write(out_dir / "comparison.md", comparison_markdown(comparison))
    seed = comparison.seeds[0]
    # The encoders of the first seed stand for their arms in the report's pictures.
    extractors = {
        arm: runner.load_encoder(out_dir / "runs" / _run_name(arm, seed))[0]
        for arm in comparison.arms
    }
    some_config = configs[comparison.arms[0], seed]
    extractors["untrained"] = runner.untrained_encoder(some_config, dataset)
    report = out_dir / "report.html"
    with threadpool_limits(limits=some_config.trainer.threads):
        write_report(comparison, dataset, extractors, report)
    for table in rich_tables(comparison):
        console.print(table)
    for note in notes_of(text_tables(comparison)):
        console.print(note, style="dim", highlight=False)
    console.print(f"Report: {report}", soft_wrap=True)


def _recorded_environment(
    config: ExperimentConfig, out_dir: Path, jobs: Sequence[str]
) -> dict[str, Any]:
    """The environment of the call that completed exactly these jobs.

    Finished runs are not trained again, so the same call repeated later keeps its first record;
    a call with other seeds or arms makes a new one.
    """
    path = out_dir / "environment.json"
    recorded = _verified(path, {"jobs", "environment"})
    if recorded is not None and set(recorded["jobs"]) == set(jobs):
        return dict(recorded["environment"])
    made = environment(config)
    atomic_write(path, checksummed_json.encode({"jobs": list(jobs), "environment": made}))
    return made


def environment(config: ExperimentConfig) -> dict[str, Any]:
    """Where and how a result was made: date, command, commit, device, threads, versions.

    Args:
        config: The experiment.
    """
    versions = {"python": platform.python_version()}
    for package in ("cjepa-kernels", *TRAINING_LIBRARIES):
        versions[package] = installed_version(package) or "not installed"
    program = Path(sys.argv[0]).name
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        # __main__.py is the same program, started by python -m.
        "command": " ".join(["cjepa" if program == "__main__.py" else program, *sys.argv[1:]]),
        "commit": commit(("rev-parse", "HEAD"), changes=("--untracked-files=no",), mark="+"),
        "device": _device(config.trainer.accelerator),
        "cores": os.cpu_count(),
        "threads per run": config.trainer.threads or torch.get_num_threads(),
        "versions": versions,
    }


def _device(accelerator: str) -> str:
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cpu_name()
