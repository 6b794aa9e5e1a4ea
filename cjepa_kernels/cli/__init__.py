"""The ``cjepa`` command, which needs the extra ``[bench]`` or ``[train]``.

This file runs without any extra, so that it can say how to get one. The commands themselves are in
``application``, and what a user reads when one fails is in ``command_errors``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cjepa_kernels._version import __version__
from cjepa_kernels.environment import check_environment
from cjepa_kernels.extras import require

# Every command needs these packages. Each command asks for the rest of what it needs itself.
NEEDED = ("typer", "rich")
USAGE = f"""cjepa_kernels {__version__}. Usage: cjepa COMMAND [OPTIONS]

  bench    compare the loss with other formulas on this machine (extra [bench])
  data, train, compare, probe, tune, info
           train hierarchical JEPAs with a contrastive term, and look at what they learned
           (extra [train])

An extra, in a clone: pip install --no-build-isolation '.[bench]'
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, or name the missing extra and exit with status 2.

    Args:
        arguments: The words after the program's name. Default: those of this process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        check_environment()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        for module in NEEDED:
            require(module, extra="bench" if arguments[:1] == ["bench"] else "train")
    except ImportError as error:
        if arguments in ([], ["--help"], ["--version"]):
            print(USAGE, end="")
            return
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    from cjepa_kernels.cli.application import app

    app(arguments, prog_name="cjepa")
