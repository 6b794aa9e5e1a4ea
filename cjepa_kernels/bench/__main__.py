"""``python -m cjepa_kernels.bench``: what ``cjepa bench`` runs."""

from __future__ import annotations

import sys

from cjepa_kernels.extras import require

NEEDED = ("typer", "rich")

if __name__ == "__main__":
    try:
        for module in NEEDED:
            require(module, extra="bench")
    except ImportError as error:
        print(f"cjepa bench: {error}", file=sys.stderr)
        sys.exit(2)
    import typer

    from cjepa_kernels.bench.cli import bench

    typer.run(bench)
