"""Tables of docs/results/gpu.md from what bench/gpu.py recorded.

python bench/gpu_tables.py bench/results/<device>-<date>.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_targets import AUTOCAST, BOTH, BYTES, COMPILED, EAGER, FORWARD, INF_CL, MM, MM3, OURS

Content = dict[str, Any]
Milliseconds = Callable[[str, int, int, str, str], float]


def milliseconds(content: Content) -> Milliseconds:
    """Median of a part, M, D, pass and candidate."""
    medians = {
        (row["part"], row["M"], row["D"], row["pass"], row["name"]): 1e3 * row["median"]
        for row in content["rows"]
    }
    return lambda *key: medians[key]


def large(content: Content) -> list[str]:
    """Batches that fill the device, against bare products and eager PyTorch."""
    of = milliseconds(content)
    sizes = sorted({(r["D"], r["M"]) for r in content["rows"] if r["part"] == "targets"})
    rows = []
    for features, count in sizes:
        size = ("targets", count, features)
        mm, forward = (of(*size, FORWARD, name) for name in (MM, OURS))
        mm3, both, eager = (of(*size, BOTH, name) for name in (MM3, OURS, AUTOCAST))
        rows.append(
            f"| {count} | {features} | {mm:.3f} | {forward:.3f} | {forward / mm:.2f} "
            f"| {both:.3f} | {both / mm3:.2f} | {eager:.1f} | {eager / both:.1f} |"
        )
    return rows


def others(content: Content) -> list[str]:
    """Against other implementations, forward + backward, with the size of each part."""
    of = milliseconds(content)
    found = {(r["part"], r["M"], r["D"], r["name"]) for r in content["rows"] if r["pass"] == BOTH}
    rows = []
    for part, name, what in (
        ("compiled", COMPILED, "`torch.compile` of eager, bf16 under autocast"),
        ("inf_cl", INF_CL, "Inf-CL, symmetric InfoNCE, tf32"),
        ("fp32", "eager fp32", "eager, fp32"),
        ("tf32", "eager tf32", "eager, tf32"),
        ("prediction", BYTES, "prediction loss: copies of as many bytes"),
    ):
        for _, count, features, _ in sorted(f for f in found if (f[0], f[3]) == (part, name)):
            ours, theirs = (of(part, count, features, BOTH, n) for n in (OURS, name))
            rows.append(
                f"| {what} | {count} | {features} | {ours:.3f} | {theirs:.3f} "
                f"| {theirs / ours:.2f} |"
            )
    return rows


def small(content: Content) -> list[str]:
    """Small batches as called and from a CUDA graph, in microseconds, ours and eager."""
    of = milliseconds(content)
    sizes = sorted({(r["M"], r["D"]) for r in content["rows"] if r["part"] == "latency"})
    return [
        f"| {count} | {features} | "
        + " | ".join(
            f"{1e3 * of(part, count, features, BOTH, name):.0f}"
            for part in ("latency", "latency_graphed")
            for name in (OURS, EAGER)
        )
        + " |"
        for count, features in sizes
    ]


def accuracy(content: Content) -> list[str]:
    """Relative errors against float64."""
    return [
        f"| {row['dtype']} | {row['name']} | {row['loss']:.1e} | {row['gradient']:.1e} |"
        for row in content["accuracy"]
    ]


def main() -> None:
    content = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for table in (large, others, small, accuracy):
        print(f"{table.__doc__}\n" + "\n".join(table(content)) + "\n")


if __name__ == "__main__":
    main()
