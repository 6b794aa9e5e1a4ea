"""Give each key of the configuration each kind of bad value.

``make config-check`` and ``test_config_fuzz.py`` run all cases. A value must be refused in one line
unless the comment beside its key in ``configs/cjepa.yaml`` allows it. With an accepted value, a
training step of the model must work on small images.
"""

from __future__ import annotations

import datetime
import math
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from repository import ROOT
from typer.testing import CliRunner

from cjepa_kernels.cli.application import app
from cjepa_kernels.train import compare  # noqa: F401  (keeps its import out of the timed command)
from cjepa_kernels.train.config import ConfigurationError, ExperimentConfig, config_from_dict
from cjepa_kernels.train.data.masking import multi_block_masks
from cjepa_kernels.train.data.views import two_views
from cjepa_kernels.train.loop.module import CJEPAModule, MaskedViews

DOCUMENTED = ROOT / "configs" / "cjepa.yaml"
MOST_SECONDS = 2.0
IMAGES = (4, 1, 8, 8)  # These have 16 patches of 2 x 2, like the documented experiment.
# With a large value of these keys a step would be slow, so no model is built with it.
SLOW = {"model.dim", "model.depth", "model.predictor_dim", "model.predictor_depth"}
# These keys take an integer within the bounds, or a float between 0 and 1.
COUNTS_OR_FRACTIONS = {"masking.visible", "masking.predicted"}
# These keys take integers, although their default is not an integer.
WHOLE = {"data.image_size", "data.train_size", "data.test_size", "data.bit_depth"}
WHOLE |= COUNTS_OR_FRACTIONS
TEXTS = {"data.source", "data.image_column", "data.label_column"}  # These keys take any text.
KINDS: dict[str, Any] = {
    "text": "abc",
    "empty text": "",
    "number in quotes": "3",
    "path": "/etc/passwd",
    "control characters": "a\x1b[31m\n\0b",
    "null": None,
    "boolean": True,
    "empty list": [],
    "list": [1, 2, 3],
    "list of texts": ["a", "b"],
    "nested list": [[1.0]],
    "mapping": {"a": 1},
    "empty mapping": {},
    "date": datetime.date(2020, 1, 1),
    "negative": -1,
    "zero": 0,
    "huge": 10**12,
    "beyond 64 bits": 10**30,
    "beyond a float": 10**400,
    "tiny": 1e-300,
    "huge float": 1e308,
    "NaN": math.nan,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "pair with NaN": [math.nan, 1.0],
    "long text": "x" * 100_000,
}
# The command line gets one value of each kind, with a key that does not take it.
ON_THE_COMMAND_LINE = {
    "text": ("trainer.epochs", "abc"),
    "empty text": ("data.source", "''"),
    "number in quotes": ("seed", "'3'"),
    "path": ("trainer.precision", "/etc/passwd"),
    "control characters": ("trainer.accelerator", '"a\\e[31m\\n\\0b"'),
    "null": ("views.flip", "null"),
    "boolean": ("model.dim", "yes"),
    "empty list": ("loss.hierarchy_weights", "[]"),
    "list": ("views.scale", "[1, 2, 3]"),
    "list of texts": ("optimizer.betas", "[a, b]"),
    "nested list": ("masking.block_scale", "[[1.0]]"),
    "mapping": ("masking.blocks", "{a: 1}"),
    "empty mapping": ("evaluation.robustness", "{}"),
    "date": ("evaluation.knn_k", "2020-01-01"),
    "negative": ("loss.jepa_weight", "-1"),
    "zero": ("model.heads", "0"),
    "huge": ("evaluation.few_label_draws", "1000000000000"),
    "beyond 64 bits": ("trainer.threads", str(10**30)),
    "beyond a float": ("loss.eps", str(10**400)),
    "tiny": ("loss.contrastive_temperature", "1e-300"),
    "huge float": ("model.mlp_ratio", "1e308"),
    "NaN": ("optimizer.learning_rate", ".nan"),
    "infinite": ("views.noise", ".inf"),
    "minus infinite": ("loss.huber_delta", "-.inf"),
    "pair with NaN": ("views.crop_area", "[.nan, 1.0]"),
    "long text": ("loss.type", "x" * 100_000),
}


class Outcome(NamedTuple):
    """The result of a case. ``fault`` is empty if the result is right."""

    key: str
    kind: str
    accepted: bool
    fault: str


@cache
def documented() -> tuple[dict[str, Any], dict[str, str]]:
    """Values and comments of the documented configuration by dotted key."""
    text = DOCUMENTED.read_text(encoding="utf-8")
    values: dict[str, Any] = {}
    for section, content in yaml.safe_load(text).items():
        if isinstance(content, dict):
            values |= {f"{section}.{key}": value for key, value in content.items()}
        else:
            values[section] = content
    comments: dict[str, str] = {}
    section, key = "", ""
    for line in text.splitlines():
        body, _, comment = line.partition("#")
        if match := re.match(r"(\s*)(\w+):", body):
            if not match[1]:
                section = match[2]
            key = f"{section}.{match[2]}" if match[1] else section
            comments[key] = ""
        elif body.strip():
            raise ValueError(f"a line that is neither key nor comment: {line!r}")
        if key:
            comments[key] += " " + comment.strip()
    return values, comments


def bounds(key: str) -> list[tuple[float, float]]:
    """The ranges ``low..high`` in a key's comment."""
    number = r"\d+(?:\.\d+)?(?:e-?\d+)?"
    ranges = re.findall(rf"(?<![\w.])({number})\.\.({number})", documented()[1].get(key, ""))
    return [(_number(low), _number(high)) for low, high in ranges]


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)


def at_the_bounds(key: str) -> dict[str, Any]:
    """The lowest and highest documented value of a key, and values just outside of that range."""
    if not (ranges := bounds(key)):
        return {}
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    default, comment = documented()[0][key], documented()[1][key]
    if isinstance(default, int) or key in WHOLE:
        values = {"below": int(low) - 1, "lowest": int(low), "highest": int(high)}
        values["above"] = int(high) + 1
    else:
        below = low * (1 - 1e-6) if low else -1e-6
        values = {"below": below, "lowest": low, "highest": high, "above": high * (1 + 1e-6)}
    if isinstance(default, list) or "[low, high]" in comment:
        length = len(default or (0, 0))
        return {kind: [value] * length for kind, value in values.items()}
    return values


def is_documented(key: str, value: Any) -> bool:
    """Whether the comment beside a key, or the kind of its value, allows a value."""
    defaults, comments = documented()
    if key not in defaults:
        return value == {}  # A section without keys has its defaults.
    default, comment = defaults[key], comments[key]
    if value is None:
        return default is None or "null" in comment
    if isinstance(value, bool) or isinstance(default, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(value, str):
        return (key in TEXTS and bool(value.strip())) or bool(
            value and re.search(rf"(?<!\w){re.escape(value)}(?!\w)", comment)
        )
    if isinstance(value, list):
        return (isinstance(default, list) or "[" in comment) and all(
            isinstance(item, int | float)
            and (not bounds(key) or any(low <= item <= high for low, high in bounds(key)))
            for item in value
        )
    if isinstance(value, float) and key in COUNTS_OR_FRACTIONS:
        return 0 < value < 1
    if isinstance(value, int | float):
        return any(low <= value <= high for low, high in bounds(key))
    return False


def cases() -> Iterator[tuple[str, str]]:
    """All pairs of a key or section and a kind of value."""
    sections = [name for name in ExperimentConfig.model_fields if name not in documented()[0]]
    for key in [*documented()[0], *sections]:
        for kind in [*KINDS, *at_the_bounds(key)]:
            yield key, kind


def run(key: str, kind: str, *, build: bool) -> Outcome:
    """Try one case. With ``build``, a model with an accepted value also has to train."""
    value = KINDS[kind] if kind in KINDS else at_the_bounds(key)[kind]
    section, _, name = key.rpartition(".")
    values: dict[str, Any] = {section: {name: value}} if section else {name: value}
    begin = time.monotonic()
    accepted = True
    try:
        config = config_from_dict(values)
        fault = "" if is_documented(key, value) else "accepted, and not documented"
        if kind in ("below", "above"):
            fault = f"accepted beyond the documented bounds: {value}"
        if build and key not in SLOW and not fault:
            fault = step(config)
    except ConfigurationError as error:
        accepted, fault = False, one_line(key, error.problems)
        if kind in ("lowest", "highest") and error.problems[0].startswith(f"{key}: "):
            fault = f"refused within the documented bounds: {error.problems[0]}"
    except ValueError as error:  # The loss, the masks and the images do not fit together.
        accepted, fault = False, one_line(key, [str(error)])
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"[:200]
    seconds = time.monotonic() - begin
    if not fault and seconds > MOST_SECONDS:
        fault = f"took {seconds:.1f} s"
    return Outcome(key, kind, accepted, fault)


def one_line(key: str, problems: Sequence[str]) -> str:
    """The fault of the messages about one bad value, or an empty string."""
    if len(problems) != 1:
        return f"{len(problems)} messages: {problems}"[:300]
    (line,) = problems
    section = key.partition(".")[0]
    if not line.startswith((f"{key}: ", f"{key} ", f"{section}: ")):
        # If two values do not fit together, the message may name the other key.
        others = documented()[0]
        if key.rpartition(".")[2] not in line and line.partition(":")[0] not in others:
            return f"no dotted key: {line}"[:200]
    if len(line) > 500 or not line.isprintable():
        return f"not one short line: {line}"[:200]
    return ""


def step(config: ExperimentConfig) -> str:
    """Build model, views and masks, and take one training step.

    Returns the fault of the loss, or an empty string.
    """
    samples = torch.arange(IMAGES[0])
    images = torch.randint(256, IMAGES, dtype=torch.uint8, generator=torch.manual_seed(0))
    module = CJEPAModule(config, IMAGES[1:], torch.zeros(1), torch.ones(1), total_steps=10)
    module.configure_optimizers()
    masks = [
        multi_block_masks(samples, module.encoder.grid, config.masking, seed=0, epoch=0, view=view)
        for view in (0, 1)
    ]
    batch = MaskedViews(
        two_views(images, samples, config.views, seed=0, epoch=0),
        torch.cat([mask.visible for mask in masks]),
        torch.cat([mask.predicted for mask in masks]),
    )
    loss = module.training_step(batch, 0)["loss"]
    loss.backward()
    return "" if bool(torch.isfinite(loss)) else f"the loss is {loss.item()}"


def run_command(kind: str, experiment: Path) -> str:
    """The fault of the command line's answer to one bad value, or an empty string."""
    key, text = ON_THE_COMMAND_LINE[kind]
    begin = time.monotonic()
    arguments = ["train", "--config", str(experiment), f"{key}={text}"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    seconds = time.monotonic() - begin
    lines = result.stderr.splitlines()
    if result.exit_code != 2 or len(lines) != 1 or result.stdout:
        return f"{key}: status {result.exit_code}, {result.output[:300]!r}"
    if not lines[0].startswith((f"error: {key}: ", f"error: override '{key}=")):
        return f"{key}: {lines[0][:200]}"
    if len(lines[0]) > 500 or not lines[0].isprintable():
        return f"{key}: not one short line: {lines[0][:200]!r}"
    return f"{key}: took {seconds:.1f} s" if seconds > MOST_SECONDS else ""


def main() -> int:
    """Run all cases and return the number of faults as the exit status."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    begin = time.monotonic()
    counts: Counter[str] = Counter()
    faults = 0
    for key, kind in cases():
        outcome = run(key, kind, build=True)
        counts["accepted" if outcome.accepted else "refused"] += 1
        if outcome.fault:
            faults += 1
            print(f"FAULT {key} = {kind}: {outcome.fault}")
    for kind in ON_THE_COMMAND_LINE:
        if fault := run_command(kind, DOCUMENTED):
            faults += 1
            print(f"FAULT command line, {kind}: {fault}")
    print(
        f"{sum(counts.values())} cases ({counts['refused']} refused, {counts['accepted']} accepted "
        f"and built) and {len(ON_THE_COMMAND_LINE)} commands in {time.monotonic() - begin:.0f} s: "
        f"{faults} faults"
    )
    return min(faults, 99)


if __name__ == "__main__":
    sys.exit(main())
