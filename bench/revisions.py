"""Checkouts of revisions, each with its compiled module, and programs run with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
NATIVE_SOURCES = ("csrc", "CMakeLists.txt", "setup.py")


def git(*arguments: str) -> str:
    """What git prints in this repository.

    Raises:
        RuntimeError: If git refuses; the message is its own.
    """
    result = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"git {arguments[0]}: {result.stderr.strip()}")
    return result.stdout.strip()


def resolve(revision: str) -> str:
    """The commit that a revision names.

    Raises:
        ValueError: If there is none.
    """
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except RuntimeError:
        raise ValueError(f"expected a revision of this repository, got {revision!r}") from None


def same_native_sources(first: str, second: str) -> bool:
    """Whether two commits build the same compiled module."""
    return not git("diff", "--name-only", first, second, "--", *NATIVE_SOURCES)


@contextmanager
def checkouts(revisions: Sequence[str]) -> Iterator[list[Path]]:
    """Folders of the revisions, built; they are removed at the end.

    Of revisions whose native sources are the same one module is built and copied.
    """
    commits = [resolve(revision) for revision in revisions]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cjepa-revisions-")))
        paths: list[Path] = []
        for number, commit in enumerate(commits):
            path = folder / f"{number}-{commit[:12]}"
            git("worktree", "add", "--detach", "--quiet", str(path), commit)
            stack.callback(git, "worktree", "remove", "--force", str(path))
            twins = (i for i in range(number) if same_native_sources(commits[i], commit))
            twin = next(twins, None)
            if twin is None:
                print(f"building the compiled module of {revisions[number]}", flush=True)
                build(path)
            else:
                print(f"{revisions[number]} has the compiled module of {revisions[twin]}")
                for module in (paths[twin] / "cjepa_kernels").glob("_C*"):
                    shutil.copy2(module, path / "cjepa_kernels")
            paths.append(path)
        yield paths


def build(checkout: Path) -> None:
    """Build a checkout's compiled module in place.

    Raises:
        RuntimeError: If it fails; the message ends with what the compiler said.
    """
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=checkout,
        env={**os.environ, "CJEPA_REQUIRE_NATIVE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise RuntimeError(f"the build of {checkout} failed:\n{result.stdout[-3000:]}")


def environment(checkout: Path) -> dict[str, str]:
    """Variables with which a program imports the package of a checkout."""
    return os.environ | {"PYTHONPATH": str(checkout)}


def check_package(expected: str) -> None:
    """Raise unless the package that this process imports is that of the folder, and compiled."""
    import cjepa_kernels

    found = Path(cjepa_kernels.__file__).parents[1]
    if found != Path(expected) or not cjepa_kernels.backends()["native"].available:
        raise RuntimeError(f"{found} is not {expected} with its compiled module")
