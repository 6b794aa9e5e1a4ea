"""Errors of a command: it prints one line for each mistake and exits with a status.

The status is 2 for every mistake of a user, a file or the operating system. Any other exception is
a defect of this program: the command exits with status 1 and a line that asks to report it. A
defect may not show again after hours of work, so its traceback is written to a file at once.
``--debug`` prints the traceback in both cases.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import torch
import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from cjepa_kernels.suggestions import nearest
from cjepa_kernels.train.loop.worker_pool import JobDefectError
from cjepa_kernels.train.reported_error import ReportedError

USER_ERROR, DEFECT = 2, 1
MOST_LINES = 20  # most lines that one error prints
# Typer brings its own copy of Click in some versions and takes the installed one in others.
_UsageError: Any = typer.BadParameter.__base__
_ClickException: Any = _UsageError.__base__
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "Invalid buffer size")


class Program(TyperGroup):
    """The group of all commands; every error of every command passes here."""

    def main(self, args: Sequence[str] | None = None, *positional: Any, **options: Any) -> Any:
        """Run a command line and exit; without arguments, show the help."""
        arguments = list(sys.argv[1:] if args is None else args) or ["--help"]
        debug = "--debug" in arguments
        for stream in (sys.stdout, sys.stderr):
            # A name that the terminal's encoding lacks must not end the program.
            with suppress(AttributeError, ValueError):
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        options["standalone_mode"] = False  # Typer raises exceptions instead of printing them
        with one_line_errors(debug), _plain_warnings():
            status = super().main(arguments, *positional, **{"obj": debug, **options})
            sys.stdout.flush()  # a full disk is an error here, before the exit status is set
        sys.exit(status if isinstance(status, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; errors are handled here, before Typer's handling hides a broken pipe."""
        with one_line_errors(debug=bool(ctx.obj)):
            return super().invoke(ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command, or name the one that was meant."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            ctx.fail(f"no command {args[0]!r}{nearest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """End the program on an exception as this file describes.

    Args:
        debug: Print the traceback as well.
    """
    try:
        yield
    except BrokenPipeError as error:
        if _stdout_is_lost():  # as in `cjepa info | head -1`, where the reader has what it wanted
            sys.exit(1)
        _end(error, debug)
    except Exception as error:
        if isinstance(error, (typer.Exit, typer.Abort)):
            raise
        _end(error, debug)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print a warning of this package as one line, without its place in the source."""
    before = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, UserWarning) and "cjepa_kernels" in Path(filename).parts:
            print(f"warning: {_on_one_line(str(message))}", file=file or sys.stderr)
        else:
            before(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def describe(error: Exception) -> list[str] | None:
    """The lines that a user should read; None for a defect of this program."""
    if isinstance(error, _ClickException):
        return [_usage(error)]
    if isinstance(error, JobDefectError):
        return None
    if isinstance(error, OSError):
        return [_operating_system(error)]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)
    ):
        return [f"out of memory: {_on_one_line(str(error))}".removesuffix(": ")]
    if problems := getattr(error, "problems", None):
        return [_on_one_line(problem) for problem in problems]
    if isinstance(error, ReportedError | ValueError | TypeError | ImportError):
        return [_on_one_line(str(error))]
    return None


def _end(error: Exception, debug: bool) -> None:
    lines = describe(error)
    status = DEFECT if lines is None else USER_ERROR
    if lines is None:
        what = _on_one_line(f"{type(error).__name__}: {error}")
        lines = [f"{what}: this is a defect of cjepa_kernels and no mistake of yours"]
        if not debug:
            lines[0] += f"; please report it with the traceback, {_saved_traceback(error)}"
    if debug:
        traceback.print_exception(error, file=sys.stderr)
    left = len(lines) - MOST_LINES
    if left > 0:
        lines = [*lines[:MOST_LINES], f"and {left} more like these"]
    console = Console(stderr=True, soft_wrap=True)
    with suppress(OSError):  # nobody may be left to read standard error
        for line in lines:
            console.print(f"[bold red]error:[/] [red]{escape(line)}[/]", highlight=False)
    _stdout_is_lost()
    raise SystemExit(status)


def _usage(error: Any) -> str:
    message = _on_one_line(str(error.format_message())).removesuffix(".")
    context = getattr(error, "ctx", None)
    where = context.command_path if context else "cjepa"
    return f"{message[:1].lower()}{message[1:]} (see {where} --help)"


def _operating_system(error: OSError) -> str:
    if error.strerror is None:  # the error comes from a worker process and names its job
        return _on_one_line(re.sub(r"\[Errno \d+\] ", "", str(error)))
    reason = error.strerror[:1].lower() + error.strerror[1:]
    return reason if error.filename is None else f"{os.fsdecode(error.filename)}: {reason}"


def _on_one_line(message: str) -> str:
    """Join the lines of a message, with semicolons between the items of a list."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    joined = ""
    for line in lines:
        joined += line if not joined else f"{' ' if joined[-1] in ':,' else '; '}{line}"
    return joined


def _saved_traceback(error: Exception) -> str:
    text = "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(prefix="cjepa-error-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        print(text, file=sys.stderr)
        return "above"
    return f"in {path}"


def _stdout_is_lost() -> bool:
    """Whether standard output takes no more text; if so, Python does not try again at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False
