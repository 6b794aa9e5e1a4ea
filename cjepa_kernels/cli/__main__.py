"""``python -m cjepa_kernels.cli``: the same as ``cjepa``."""

from __future__ import annotations

from cjepa_kernels.cli import main

if __name__ == "__main__":
    main()
