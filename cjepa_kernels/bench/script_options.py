"""What the command lines of the benchmark scripts share: options, progress and results."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cjepa_kernels.backends import backends
from cjepa_kernels.bench.records import Record, write_results


def read_options(
    description: str | None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    seconds: float | None = None,
    quick_seconds: float | None = None,
    command_line: Sequence[str] | None = None,
) -> Any:
    """Read a script's own options and those that all scripts share.

    Args:
        description: Docstring of the script.
        options: Its own options, by flag, with the arguments of ``add_argument``.
        seconds: Default of ``--seconds``, which exists only with a default.
        quick_seconds: Its default with ``--quick``, which exists only with this default.
        command_line: What is read. Default: the arguments of this process.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, arguments in (options or {}).items():
        parser.add_argument(flag, **arguments)
    if seconds is not None:
        parser.add_argument(
            "--seconds", type=float, help=f"seconds for each case (default {seconds:g})"
        )
    if quick_seconds is not None:
        parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--no-save", action="store_true", help="do not write bench/results")
    parsed = parser.parse_args(command_line)
    parsed.quick = getattr(parsed, "quick", False)
    if seconds is not None and parsed.seconds is None:
        parsed.seconds = quick_seconds if parsed.quick else seconds
    return parsed


def require_native() -> None:
    """Exit with the reason if the native back end, which the script times, is missing."""
    native = backends()["native"]
    if not native.available:
        raise SystemExit(f"This benchmark times the native back end: {native.reason}")


def save(options: Any, name: str, rows: list[Record], **sections: Any) -> None:
    """Write the results file, unless the run was a quick one or must not save.

    Args:
        options: Of ``read_options``.
        name: As for ``write_results``.
        rows: As for ``write_results``.
        **sections: As for ``write_results``, and its options.
    """
    if options.quick:
        print("not written: bench/results holds whole runs, not those of --quick")
    elif not options.no_save:
        print(f"written: {write_results(name, rows, **sections)}")


class Progress:
    """Says which of how many steps begins, and after how many seconds."""

    def __init__(self, steps: int, say: Callable[[str], None] | None = None) -> None:
        self.steps, self.done = steps, 0
        self.say = say or (lambda text: print(text, flush=True))
        self.start = time.perf_counter()

    def __call__(self, step: object) -> None:
        """Say that a step begins."""
        self.done += 1
        elapsed = time.perf_counter() - self.start
        self.say(f"[{self.done}/{self.steps}, {elapsed:.0f} s] {step}")
