"""The signatures of other projects' losses, which ``cjepa_kernels.compat`` has as well.

``python python_tests/support/peer_signatures.py --write``, where those projects are installed,
records them in ``python_tests/compat/peer_signatures.json`` with the versions.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().parents[1] / "compat" / "peer_signatures.json"

# The distribution, its module and the names there, by the module of cjepa_kernels.compat.
PEERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "info_nce": ("info-nce-pytorch", "info_nce", ("InfoNCE", "info_nce")),
    "lightly": ("lightly", "lightly.loss", ("NTXentLoss", "DCLLoss", "DCLWLoss")),
    "open_clip": ("open_clip_torch", "open_clip.loss", ("ClipLoss",)),
    "pytorch_metric_learning": (
        "pytorch-metric-learning",
        "pytorch_metric_learning.losses",
        ("NTXentLoss", "SupConLoss", "SelfSupervisedLoss"),
    ),
    "sentence_transformers": (
        "sentence-transformers",
        "sentence_transformers.sentence_transformer.losses",
        ("MultipleNegativesRankingLoss",),
    ),
}


class _Named:
    """A function as a default, which goes by its name."""

    def __init__(self, function: Any) -> None:
        self.name = function.__name__

    def __repr__(self) -> str:
        return self.name


def describe(function: Callable[..., Any]) -> str:
    """The signature without annotations."""
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        if inspect.isfunction(parameter.default):
            parameter = parameter.replace(default=_Named(parameter.default))
        parameters.append(parameter.replace(annotation=inspect.Parameter.empty))
    return str(inspect.Signature(parameters))


def signatures(value: Any) -> dict[str, str]:
    """The signatures of a function, or of the constructor and the forward of a class."""
    if inspect.isclass(value):
        members = {"__init__": value.__init__, "forward": vars(value).get("forward", value.forward)}
    else:
        members = {"call": value}
    return {name: describe(member) for name, member in members.items()}


def of_module(module: str, names: tuple[str, ...]) -> dict[str, Any]:
    """The signatures of some names of a module."""
    imported = importlib.import_module(module)
    return {name: signatures(getattr(imported, name)) for name in names}


def is_installed(name: str) -> bool:
    """Whether the project that a module of ``cjepa_kernels.compat`` stands for is installed."""
    return importlib.util.find_spec(PEERS[name][1].partition(".")[0]) is not None


def main() -> None:
    """Record the signatures of the projects that are installed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", required=True)
    parser.parse_args()
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    for name, (distribution, module, names) in PEERS.items():
        if is_installed(name):
            record[name] = {
                "distribution": distribution,
                "version": importlib.metadata.version(distribution),
                "signatures": of_module(module, names),
            }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
