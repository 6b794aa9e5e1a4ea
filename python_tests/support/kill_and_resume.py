"""Kill training runs at random moments, damage their files, resume them and compare the results.

Every run must end with the numbers of an uninterrupted run, or with an error that names a file and
says what to do. The test then does what the error says. To run many kills by hand:

    python python_tests/support/kill_and_resume.py --kills 20
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
from train_experiments import tiny

from cjepa_kernels.train.config import ExperimentConfig, config_to_dict

# Processes are forked from one that has imported everything, so that a run begins immediately.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["cjepa_kernels.cli.application", "cjepa_kernels.train.runner"])
_COMPARED_FILES = ("config.yaml", "metrics.csv", "log.txt")


def cjepa(*arguments: str | Path, log: Path) -> ForkServerProcess:
    """Start the command line in a process of its own, which prints to a file."""
    process = FORKS.Process(target=_run, args=([str(a) for a in arguments], log))
    process.start()
    return process


def _run(arguments: list[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = ["cjepa", *arguments]
    from cjepa_kernels.cli.application import app

    app()


@dataclass
class Trial:
    """Counts of kills, damaged files, errors and completed runs."""

    kills: int = 0
    damaged: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    completed: int = 0


def kill_and_resume(
    config: ExperimentConfig, directory: Path, *, kills: int, seed: int, damage: float = 0.7
) -> Trial:
    """Start, kill and damage runs until they have recovered from all kills and a damaged file.

    Args:
        config: The experiment.
        directory: An empty directory.
        kills: Number of kills.
        seed: Seed for the times of the kills and for the damage.
        damage: Probability of a damaged file after a kill.

    Raises:
        AssertionError: If a run ends with other numbers, or with an error that names no remedy.
    """
    chance = random.Random(seed)
    file, log = directory / "experiment.json", directory / "log"
    file.write_text(json.dumps(config_to_dict(config)))
    whole, run_dir = directory / "whole", directory / "killed"
    # This call makes the server import everything, which must not count towards the duration.
    cjepa("--version", log=log).join()
    started = time.monotonic()
    first = cjepa("train", "--config", file, "--out", whole, log=log)
    first.join()
    assert first.exitcode == 0, log.read_text()
    duration = time.monotonic() - started

    trial = Trial()
    disturbed = False
    while True:
        # Kills go on until a file was damaged, because early kills find no file.
        killing = trial.kills < kills or (damage > 0 and not trial.damaged)
        if not killing and not disturbed:
            return trial
        process = cjepa("train", "--config", file, "--out", run_dir, log=log)
        # After the last kill, the run may end by itself.
        process.join(chance.uniform(0, duration) if killing else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            trial.kills += 1
            disturbed = True
            if chance.random() < damage:
                trial.damaged.update(_damage(run_dir, chance))
        elif process.exitcode == 0:
            _compare(run_dir, whole)
            trial.completed += 1
            disturbed = False
            shutil.rmtree(run_dir)
        else:
            assert process.exitcode == 2, (
                f"exit code {process.exitcode}, {trial}: {log.read_text()}"
            )
            trial.errors[_follow(log.read_text(), run_dir)] += 1


def _damage(run_dir: Path, chance: random.Random) -> list[str]:
    """Flip one bit of a file, or remove its end."""
    files = sorted(path for path in run_dir.rglob("*") if path.is_file() and path.stat().st_size)
    if (run_dir / "result.json").exists():
        # Once a run has finished, the program does not read or write these files again.
        files = [path for path in files if path.name not in _COMPARED_FILES]
    if not files:
        return []
    checkpoints = [path for path in files if path.suffix == ".ckpt"]
    if checkpoints and chance.random() < 0.5:
        files = checkpoints
    file = chance.choice(files)
    content = bytearray(file.read_bytes())
    place = chance.randrange(len(content))
    if chance.random() < 0.25:
        del content[place:]
    else:
        content[place] ^= 1 << chance.randrange(8)
    # A failing disk changes a file in place, so a hard link to it shows the damage too.
    file.write_bytes(content)
    return [".partial" if file.suffix == ".partial" else file.name]


def _follow(output: str, run_dir: Path) -> str:
    """Do what an error says and return the name of the file that it is about."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, output
    assert "Traceback" not in output, output
    error = lines[0]
    assert str(run_dir) in error, error
    commands = re.search(r"run (mv .+?) and start the same command again", error) or re.search(
        r"remove it to start the run again: (rm .+)$", error
    )
    if commands:
        subprocess.run(commands[1], shell=True, check=True)
        return "last.ckpt"
    if "remove it to evaluate the run again" in error:
        (run_dir / "result.json").unlink()
        return "result.json"
    damaged_config = ("remove the directory", "holds a run of another configuration")
    assert any(words in error for words in damaged_config), error
    shutil.rmtree(run_dir)
    return "config.yaml"


def _compare(actual: Path, expected: Path) -> None:
    for name in _COMPARED_FILES:
        assert (actual / name).read_bytes() == (expected / name).read_bytes(), name
    results = [json.loads((path / "result.json").read_text()) for path in (actual, expected)]
    for key in ("history", "evaluation", "findings", "data"):
        assert results[0][key] == results[1][key], key
    states = [
        torch.load(path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for path in (actual, expected)
    ]
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        assert torch.equal(states[0][name], value), name
    assert not list(actual.rglob("*.partial"))


def main() -> None:
    """Run many kills in two precisions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="in each precision")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for precision in ("32-true", "bf16-mixed"):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            trial = kill_and_resume(
                tiny(f"trainer.precision={precision}", "trainer.epochs=12"),
                Path(directory),
                kills=arguments.kills,
                seed=arguments.seed,
            )
        print(
            f"{precision}: {trial.kills} kills, damaged {dict(trial.damaged)}, errors about "
            f"{dict(trial.errors)}; {trial.completed} runs completed, each with the numbers of an "
            f"uninterrupted run; {time.monotonic() - started:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
