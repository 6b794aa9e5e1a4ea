"""Compare the bits that two revisions compute, for all operators, back ends and short trainings.

    python python_tests/support/same_results.py BASE [--quick] [--groups functions,ranks]
    python python_tests/support/same_results.py --base-directory CHECKOUT

BASE is a revision, which the script checks out and builds. CHECKOUT is a directory with a checkout
and its compiled module. The script compares this working tree with it. Each side runs in processes
of its own, and the script compares fingerprints of values, gradients, weights and recorded numbers.
The exit code is 1 if any differs. ``--quick`` runs fewer groups and cases, which takes about two
minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from result_cases import fingerprint

ROOT = Path(__file__).resolve().parents[2]
CASES = Path(__file__).with_name("result_cases.py")

# Groups of cases with the environment variables of their processes. The native back end runs again
# without saved exponentials and for each instruction set, which has its own compiled core.
GROUPS: dict[str, dict[str, str]] = {
    "functions": {},
    "triton": {"TRITON_INTERPRET": "1"},
    "ranks": {},
    "native-without-kept": {"CJEPA_KEPT_MIB": "0"},
    "native-baseline": {"CJEPA_INSTRUCTION_SET": "baseline"},
    "native-avx2": {"CJEPA_INSTRUCTION_SET": "avx2"},
    "native-avx512": {"CJEPA_INSTRUCTION_SET": "avx512"},
    "native-avx512_bf16": {"CJEPA_INSTRUCTION_SET": "avx512_bf16"},
    "training": {},
}
SMALL = {
    "model": {
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "predictor_dim": 8,
        "predictor_depth": 1,
        "predictor_heads": 2,
    },
    "trainer": {"epochs": 2, "batch_size": 32, "threads": 1},
    "evaluation": {"few_labels": 3, "few_label_draws": 2, "knn_k": 3, "robustness": False},
    "logging": {"tensorboard": False, "progress_bar": False},
}
DIGITS = {"data": {"source": "digits", "train_size": 128, "test_size": 60}, **SMALL}
COLOUR = {
    "data": {"source": "imagefolder:images", "image_size": 12},
    "views": {
        "crop_area": [0.3, 1.0],
        "flip": 0.5,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "grayscale": 0.2,
    },
    "masking": {"visible": 10, "predicted": 8},
    **SMALL,
    "trainer": {"epochs": 1, "batch_size": 16, "threads": 1, "precision": "bf16-mixed"},
}
# These numbers differ between two runs of the same revision.
CHANGING = frozenset({"checksum", "created", "date", "environment", "finished", "seconds"})


def variables(checkout: Path, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment in which a process imports the package of a checkout."""
    fixed = {"PYTHONPATH": str(checkout), "CJEPA_POISON_MEMORY": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **fixed, "PYTHONDONTWRITEBYTECODE": "1", **extra}


def run_cases(checkout: Path, group: str, quick: bool) -> dict[str, dict[str, str]]:
    """The fingerprints of one side, by case and result."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "results.json")
        command = [sys.executable, str(CASES), group, str(out), *(["--quick"] * quick)]
        subprocess.run(
            command,
            cwd=directory,
            env=variables(checkout, GROUPS[group]),
            # In Triton's interpreter NumPy warns of inf and NaN.
            stderr=subprocess.DEVNULL if group == "triton" else None,
            check=True,
        )
        results: dict[str, dict[str, str]] = json.loads(out.read_text(encoding="utf-8"))
        return results


def run_trainings(checkout: Path, quick: bool) -> dict[str, dict[str, str]]:
    """Train the three arms on digits, and one run on colour images.

    Returns the fingerprints of weights, metrics and results.
    """
    results: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        Path(directory, "digits.yaml").write_text(json.dumps(DIGITS), encoding="utf-8")
        Path(directory, "colour.yaml").write_text(json.dumps(COLOUR), encoding="utf-8")
        draw_images(directory / "images")
        calls = [["compare", "--config", "digits.yaml", "--seeds", "0", "--out", "arms"]]
        if not quick:
            calls += [
                ["train", "--config", "colour.yaml", "--out", "colour"],
                ["probe", "colour", "--json", "colour/probe.json"],
                ["train", "--config", "digits.yaml", "--out", "ranks", "trainer.devices=2"],
            ]
        for call in calls:
            run_cjepa(checkout, directory, call)
        printed = run_cjepa(checkout, directory, ["data", "--config", "colour.yaml", "--json"])
        results["cjepa data"] = dict(fingerprints_of(json.loads(printed)))
        for path in sorted(directory.rglob("*")):
            if fingerprints := dict(fingerprints_of_file(path)):
                results[f"training {path.relative_to(directory)}"] = fingerprints
    return results


def draw_images(folder: Path) -> None:
    """Write small random colour images, PNG and JPEG, in folders of train and test classes."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 5)):
        for label in ("a", "b", "c"):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                height, width = (12, 12) if number % 2 else (15, 20)
                size = (height, width, 3)
                pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
                suffix = "jpg" if number % 3 == 0 else "png"
                path = folder / split / label / f"{number}.{suffix}"
                Image.fromarray(pixels.numpy()).save(path)


def run_cjepa(checkout: Path, directory: Path, arguments: list[str]) -> str:
    """Run the command line of a checkout and return its output.

    Raises:
        RuntimeError: The command failed. The message is its output.
    """
    # With two devices Lightning starts the program a second time. That works with a file, but not
    # with python -c.
    program = directory / "start_cjepa.py"
    program.write_text(
        "from cjepa_kernels.cli import main\n\nif __name__ == '__main__':\n    main()\n",
        encoding="utf-8",
    )
    result = subprocess.run(
        [sys.executable, str(program), *arguments],
        cwd=directory,
        env=variables(checkout, {}),
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"cjepa {' '.join(arguments)}: {result.stdout}{result.stderr}")
    return result.stdout


def fingerprints_of_file(path: Path) -> Iterator[tuple[str, str]]:
    """The fingerprints of a checkpoint's weights, a table's cells or a JSON file's values."""
    if path.suffix == ".ckpt":
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
        yield from fingerprints_of(checkpoint["state_dict"])
    elif path.suffix == ".json" and path.name != "environment.json":
        yield from fingerprints_of(json.loads(path.read_text(encoding="utf-8")))
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            yield from fingerprints_of(list(csv.DictReader(file)))


def fingerprints_of(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The fingerprints of the leaves of nested mappings and lists, by their dotted paths."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            if key not in CHANGING:
                yield from fingerprints_of(part, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from fingerprints_of(part, f"{path}[{number}]")
    else:
        yield path, fingerprint(value)


def differences(
    base: Mapping[str, Mapping[str, str]], present: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """A line for each result that is not the same on both sides."""
    lines = [f"{case}: only in BASE" for case in base.keys() - present.keys()]
    lines += [f"{case}: only in this tree" for case in present.keys() - base.keys()]
    for case in base.keys() & present.keys():
        for name in base[case].keys() | present[case].keys():
            before, now = base[case].get(name, "nothing"), present[case].get(name, "nothing")
            if before != now:
                lines.append(f"{case}, {name}: {before} -> {now}")
    return sorted(lines)


def default_groups(quick: bool) -> list[str]:
    """The names of all groups that this machine can run, or of the quick ones."""
    if quick:
        return ["functions", "triton", "ranks", "training"]
    from cjepa_kernels.backends import compiled_module

    module = compiled_module()
    sets = module.build_info()["instruction_sets"] if module is not None else []
    return [
        group
        for group, extra in GROUPS.items()
        if extra.get("CJEPA_INSTRUCTION_SET") in (None, *sets)
    ]


def compare(base: Path, groups: list[str], quick: bool) -> bool:
    """Run both sides of every group, print a line for each, and return whether all are the same."""
    same = True
    print(f"{'group':<22}{'cases':>7}{'results':>9}{'errors':>8}{'different':>11}")
    for group in groups:
        sides = [
            run_trainings(side, quick) if group == "training" else run_cases(side, group, quick)
            for side in (base, ROOT)
        ]
        lines = differences(*sides)
        results = sum(len(case) for case in sides[1].values())
        errors = sum("error" in case for case in sides[1].values())
        print(f"{group:<22}{len(sides[1]):>7}{results:>9}{errors:>8}{len(lines):>11}", flush=True)
        for line in lines[:10]:
            print(f"  {line}", flush=True)
        same = same and not lines
    return same


def main() -> None:
    """Compare this tree with a revision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", help="A revision, to be checked out and built.")
    parser.add_argument("--base-directory", type=Path, help="A checkout that is built already.")
    parser.add_argument(
        "--groups", help=f"Some of {', '.join(GROUPS)}; default: all that run here."
    )
    parser.add_argument("--quick", action="store_true", help="Run fewer cases.")
    arguments = parser.parse_args()
    if (arguments.base is None) == (arguments.base_directory is None):
        parser.error("expected either BASE or --base-directory")
    groups = arguments.groups.split(",") if arguments.groups else default_groups(arguments.quick)
    if unknown := [group for group in groups if group not in GROUPS]:
        parser.error(f"--groups: expected some of {', '.join(GROUPS)}, got {', '.join(unknown)}")
    with ExitStack() as stack:
        base = arguments.base_directory
        if base is None:
            sys.path.insert(0, str(ROOT / "bench"))
            from revisions import checkouts

            (base,) = stack.enter_context(checkouts([arguments.base]))
        sys.exit(not compare(base.resolve(), groups, arguments.quick))


if __name__ == "__main__":
    main()
