"""``python -m cjepa_kernels.bench``: the same as ``cjepa bench``."""

from __future__ import annotations

import sys

from cjepa_kernels.cli import main

if __name__ == "__main__":
    main(["bench", *sys.argv[1:]])
