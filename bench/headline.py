"""What the README says of the recorded results."""

from __future__ import annotations

from typing import Any

from gpu_tables import milliseconds
from gpu_targets import AUTOCAST, COMPILED, MM3
from gpu_targets import OURS as TRITON

from cjepa_kernels.bench.candidates import BOTH, EAGER, FORWARD, MM, OURS
from cjepa_kernels.bench.candidates import COMPILED as COMPILED_CPU

CPU_ROWS, GPU_ROWS, FEATURES = 8192, 65536, 256
Content = dict[str, Any]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds > 0.1 else f"{1e3 * seconds:.3g}"


def sentence(cpu: Content, gpu: Content) -> str:
    """What the README says below the picture: where it was measured, and its figures."""
    seconds = {
        row["name"]: row["median"]
        for row in cpu["rows"]
        if (row["M"], row["D"], row["pass"]) == (CPU_ROWS, FEATURES, BOTH)
    }
    of = milliseconds(gpu)

    def on_gpu(part: str, name: str) -> float:
        return of(part, GPU_ROWS, FEATURES, BOTH, name)

    eager, compiled, lightly, hjepa = (
        f"{seconds[name] / seconds[OURS]:.1f}" for name in (EAGER, COMPILED_CPU, "lightly", "hjepa")
    )
    settings, (device,) = cpu["settings"], gpu["gpu"]
    return (
        f"Forward + backward of NT-Xent, D = {FEATURES}. CPU: {settings['dtype']}, "
        f"{processor(cpu['environment'])}, batch {CPU_ROWS // 2:,} pairs: "
        f"{eager} times as fast as the plain formula, {compiled} as `torch.compile` of it, "
        f"{lightly} as lightly's, {hjepa} as H-JEPA's. "
        f"GPU: bf16, {' '.join(device['device'].split()[:2])}, batch {GPU_ROWS // 2:,} pairs: "
        f"{on_gpu('targets', AUTOCAST) / on_gpu('targets', TRITON):.1f} times as fast as the plain "
        f"formula, {on_gpu('compiled', COMPILED) / on_gpu('compiled', TRITON):.1f} as "
        f"`torch.compile` of it, {on_gpu('targets', TRITON) / on_gpu('targets', MM3):.2f} of the "
        "time of its three bare products."
    )


def processor(environment: Content) -> str:
    """A CPU and what of it was used: ``2 threads of an AMD EPYC (AVX2)``."""
    instructions = environment["instruction_set"].split("_")[0].upper().replace("AVX5", "AVX-5")
    article = "an" if environment["device"][0] in "AEIO" else "a"
    return f"{environment['threads']} threads of {article} {environment['device']} ({instructions})"


# Heads of the README's table: what is measured of it, and of which candidate.
LOSSES = {
    OURS: "ours",
    EAGER: "plain",
    COMPILED_CPU: "`torch.compile`",
    "lightly": "lightly's",
    "hjepa": "H-JEPA's",
}
RATIOS = {FORWARD: "forward / mm", BOTH: "f + b / 3 mm"}
REMEMBERED = (OURS, EAGER)


def cpu_table(content: Content) -> str:
    """The README's: M, then of each loss forward + backward in ms and its memory."""
    memory = [f"{LOSSES[name]}, MiB" for name in REMEMBERED]
    heads = ["M = 2B", *RATIOS.values(), *LOSSES.values(), *memory]
    rows = []
    for count in sorted({row["M"] for row in content["rows"] if row["D"] == FEATURES}):
        at = (count, FEATURES)
        seconds = {
            (r["pass"], r["name"]): r["median"] for r in content["rows"] if (r["M"], r["D"]) == at
        }
        extra = {r["name"]: r["extra_bytes"] for r in content["memory"] if (r["M"], r["D"]) == at}
        ratios = [
            f"{seconds[key, OURS] / seconds[key, MM]:.2f}" if (key, MM) in seconds else "-"
            for key in RATIOS
        ]
        cells = [
            *ratios,
            *(_ms(seconds[BOTH, n]) if (BOTH, n) in seconds else "-" for n in LOSSES),
            *(f"{extra[n] / 2**20:.0f}" if n in extra else "-" for n in REMEMBERED),
        ]
        rows.append(f"| {count} | {' | '.join(cells)} |")
    head = f"| {' | '.join(heads)} |"
    return "\n".join([head, "|" + "---:|" * len(heads), *rows])
