"""Test and time the kernels on a machine with a GPU, in at most 6 minutes: ``make gpu-check``.

    python bench/gpu_check.py [--out runs/gpu-check] [--try-on-cpu]

The check needs PyTorch and Triton, and no network; nothing has to be installed. Its tests need
pytest and hypothesis, and run on several processes with pytest-xdist. First it compiles in many
processes, then it runs the tests of what has changed since the last record, then it measures the
latency as called, and then the time of the device. Every step is a process with a limit of its own.
The record ``gpu_check.json`` and the page ``gpu_check.md`` are written anew after every step, and
``logs/`` holds what each step printed. ``bench/gpu_check_record.py`` takes a record over into the
documents.

Gluon kernels and launch plans are tested and measured also where they have not passed yet, as with
``CJEPA_GLUON=1 CJEPA_LAUNCH_PLANS=1``. ``--as-chosen`` leaves the choice to the package. Some steps
switch both off, and the record names the variables of the others.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]


def end(signum: int, frame: FrameType | None) -> None:
    """Exit by an exception, so that the running steps are stopped."""
    sys.exit(128 + signum)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check", help="a folder")
    parser.add_argument(
        "--try-on-cpu",
        action="store_true",
        help="without a GPU: the same course with tiny sizes on the CPU",
    )
    parser.add_argument(
        "--as-chosen",
        action="store_true",
        help="Gluon kernels and launch plans only where the package chooses them by itself",
    )
    options = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        print(f"PyTorch is not installed for {sys.executable}: nothing was checked")
        return 1
    sys.path.insert(0, str(ROOT))  # The package need not be installed.
    import torch

    processes = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes == 0 and not options.try_on_cpu:
        print("there is no CUDA device: nothing was checked")
        return 1
    signal.signal(signal.SIGTERM, end)
    # In a process that a shell started in the background, SIGINT is ignored. Its children inherit
    # that, and pytest would not stop.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from gpu_check_run import check_machine

    return int(not check_machine(options.out, processes, as_chosen=options.as_chosen))


if __name__ == "__main__":
    sys.exit(main())
