"""Record the full comparison of this machine in the documents.

    python bench/record.py [--device cpu] [--dtype fp32] [--results results.json]

Once everything is measured, the script writes docs/results/<device>.json and .md and
docs/images/bench_<device>_*.svg. Until then the results are in runs/bench-record. ``--results``
records what ``cjepa bench`` measured elsewhere.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from rich.console import Console

from cjepa_kernels.bench import cli, plots, report
from cjepa_kernels.bench.comparison import Results
from cjepa_kernels.bench.records import as_json
from cjepa_kernels.bench.sources import since
from cjepa_kernels.files import atomic_write

ROOT = Path(__file__).parent.parent


def device_name(results: Results) -> str:
    """Stem of the files of a device, such as ``amd-epyc-avx2`` or ``nvidia-h100-80gb-hbm3``."""
    environment = results["environment"]
    words = environment["device"]
    if environment["cuda"] is None:
        words += f" {environment['instruction_set']}"
    if results["settings"]["dtype"] != "fp32":
        words += f" {results['settings']['dtype']}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def record(results: Results, documents: Path) -> list[Path]:
    """Write the results, their page and its plots, and return the paths."""
    name = device_name(results)
    page = documents / "results" / f"{name}.md"
    images = plots.write_all_svgs(results, documents / "images", f"bench_{name}")
    atomic_write(page.with_suffix(".json"), as_json(results))
    atomic_write(page, page_of(results))
    return [page.with_suffix(".json"), page, *images]


def page_of(results: Results) -> str:
    """The page, with its plots, and for a GPU whether the kernels have changed since."""
    name = device_name(results)
    page = report.markdown(
        results,
        {
            title: f"../images/bench_{name}_{plot}.svg"
            for plot, (title, _) in plots.drawable(results).items()
        },
    )
    if "sources" not in results["environment"]:
        return page
    title, first_line, rest = page.split("\n\n", 2)
    return "\n\n".join([title, f"{first_line} {since(results['environment']['sources'])}", rest])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--dtype", default="fp32", help="dtype of the inputs")
    parser.add_argument("--results", type=Path, help="results.json of a run of cjepa bench")
    options = parser.parse_args()
    if options.results is not None:
        results = report.load(options.results)
        if not results["complete"]:
            print("recorded as a run that was cut off: its page says so")
    else:
        try:
            settings = cli.make_settings(device=options.device, dtype=options.dtype)
        except ValueError as error:
            parser.error(str(error))
        results = cli.run(settings, ROOT / "runs" / "bench-record", Console(soft_wrap=True))
    for path in record(results, ROOT / "docs"):
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
