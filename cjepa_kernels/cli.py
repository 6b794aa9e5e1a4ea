"""Entry point of the ``cjepa`` command, which needs the extra ``[bench]`` or ``[train]``."""

from __future__ import annotations

import sys

from cjepa_kernels.extras import require

NEEDED = ("typer", "rich")  # by every command; each asks for the rest itself


def main() -> None:
    """Run the command line, or say which extra is missing and exit with 2."""
    try:
        for module in NEEDED:
            require(module, extra="bench" if sys.argv[1:2] == ["bench"] else "train")
    except ImportError as error:
        print(f"cjepa: {error}", file=sys.stderr)
        sys.exit(2)
    from cjepa_kernels.train.cli import app

    app()
