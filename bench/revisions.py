"""Checkouts of revisions with their compiled modules, and processes that take turns."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("revision_worker.py")
NATIVE_SOURCES = ("csrc", "CMakeLists.txt", "setup.py")


# This module also runs beside old revisions of the package, so it imports nothing from it that they
# may lack. That is why it has a function of its own that calls git.
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


def check_package(expected: Path) -> None:
    """Raise unless the package that this process imports is that of the folder, and compiled."""
    import cjepa_kernels

    imported = Path(cjepa_kernels.__file__).parents[1]
    if imported != expected or not cjepa_kernels.backends()["native"].available:
        raise RuntimeError(f"{imported} is not {expected} with its compiled module")


class Worker:
    """A process of bench/revision_worker.py that measures one revision, on request."""

    def __init__(self, checkout: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(checkout)},
        )

    def measure(self, request: dict[str, Any]) -> Any:
        """The worker's answer to a request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of {self.process.args} ended: see above")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def measure_in_turn(
    base: Path,
    head: Path,
    requests: Sequence[dict[str, Any]],
    *,
    processes: int,
    rounds: int,
) -> list[list[list[tuple[Any, Any]]]]:
    """What two revisions answer, taking turns; with new processes again and again.

    Where memory lies changes times from process to process, so many turns of one process are not
    many measurements.

    Args:
        base: Checkout of one revision.
        head: That of the other.
        requests: For bench/revision_worker.py.
        processes: Of each revision.
        rounds: Turns of each process for a request.

    Returns:
        For each request and each pair of processes, the answers (base, head) of every turn.
    """
    answers_of_requests: list[list[list[tuple[Any, Any]]]] = [[] for _ in requests]
    for number in range(processes):
        print(f"processes {number + 1} of {processes}", flush=True)
        workers = [Worker(base), Worker(head)]
        try:
            for request, of_request in zip(requests, answers_of_requests, strict=True):
                turns = []
                for turn in range(rounds):
                    order = (0, 1) if turn % 2 == 0 else (1, 0)
                    answers = {side: workers[side].measure(request) for side in order}
                    turns.append((answers[0], answers[1]))
                of_request.append(turns)
        finally:
            for worker in workers:
                worker.close()
    return answers_of_requests
