"""Instructions that the Triton kernels spend on an element of S, counted in their machine code.

    python bench/gpu_count.py [--architecture 90] [--no-save]

Needs no GPU. Of each kernel it is the shortest loop that takes exponentials, or all of a kernel
without one (its product's loop included), over the exponentials that a thread takes there.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any

import offline
import torch

from cjepa_kernels.bench.records import write_results
from cjepa_kernels.bench.tables import print_table

ROWS = 65536
FEATURES = (64, 128, 256, 768)
KERNELS = ("tiles_kernel", "strips_kernel", "owned_rows_kernel", "coefficient_tiles_kernel")
HEADER = ["D", "kernel", "registers", "instructions", "product", "exponentials", "issue"]
# Of a processor of compute capability 9.0 in a clock: dense bf16 operations (NVIDIA's data sheet of
# the H100, 989 TFLOP/s from 132 of them at 1.83 GHz), exponentials, instructions of a warp.
OPERATIONS, EXPONENTIALS, WARP_INSTRUCTIONS = 4096, 16, 4
TILE = 128


def loops(assembly: str) -> Iterator[list[str]]:
    """Bodies of loops, from a label to a branch back to it, and at last the whole kernel."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        label = re.match(r"(\.L_x_\d+):", line.strip())
        instruction = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])
            branch = re.search(r"BRA.*\((\.L_x_\d+)\)", instruction[1])
            if branch and branch[1] in labels:
                yield instructions[labels[branch[1]] :]
    yield instructions


def per_element(assembly: str) -> float:
    """Instructions of a thread for each exponential that it takes, in the tightest loop."""
    found = []
    for body in loops(assembly):
        exponentials = sum("MUFU.EX2" in instruction for instruction in body)
        if exponentials:
            found.append((len(body), len(body) / exponentials))
    if not found:
        raise ValueError("the kernel takes no exponentials")
    return min(found)[1]


def count(features: int, architecture: int) -> list[dict[str, Any]]:
    """A record for each kernel of that width; cycles are of a tile on one processor."""
    call = offline.nt_xent_call(ROWS, features, torch.bfloat16)
    records: dict[str, dict[str, Any]] = {}
    for launch in offline.launches(architecture, call):
        if launch.name not in KERNELS or launch.name in records:
            continue
        binary = offline.compile_launch(launch, architecture)
        instructions = per_element(binary.assembly)
        products = 2 if launch.name == "owned_rows_kernel" else 1
        records[launch.name] = {
            "D": features,
            "kernel": launch.name,
            "place": dict(launch.constants).get("PLACE"),
            "registers": binary.registers,
            "instructions": instructions,
            "product_cycles": products * 2 * TILE**2 * features / OPERATIONS,
            "exponential_cycles": TILE**2 / EXPONENTIALS,
            "issue_cycles": instructions * TILE**2 / 32 / WARP_INSTRUCTIONS,
        }
    return list(records.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--no-save", action="store_true", help="leave the results file as it is")
    arguments = parser.parse_args()
    records = [r for features in FEATURES for r in count(features, arguments.architecture)]
    rows = [
        [
            str(r["D"]),
            r["kernel"] if r["place"] is None else f"{r['kernel']} ({r['place']})",
            str(r["registers"]),
            f"{r['instructions']:.1f}",
            *(f"{r[k]:.0f}" for k in ("product_cycles", "exponential_cycles", "issue_cycles")),
        ]
        for r in records
    ]
    print_table(HEADER, rows)
    if not arguments.no_save:
        write_results(f"gpu_instructions_sm{arguments.architecture}", records)


if __name__ == "__main__":
    main()
