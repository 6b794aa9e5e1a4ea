"""Entry point of the ``cjepa`` command; the command itself needs the extra ``[train]``."""

from __future__ import annotations

import sys

from cjepa_kernels.extras import require

NEEDED = ("typer", "rich", "lightning", "sklearn", "datasets", "pydantic", "yaml", "matplotlib")


def main() -> None:
    """Run the command line, or say which extra is missing and exit with 2."""
    try:
        for module in NEEDED:
            require(module, extra="train")
    except ImportError as error:
        sys.exit(_explain(error))
    from cjepa_kernels.train.cli import app

    app()


def _explain(error: ImportError) -> int:
    print(f"cjepa: {error}", file=sys.stderr)
    return 2
