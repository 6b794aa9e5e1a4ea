"""Losses from a configuration: a mapping or a YAML file.

A key that is absent takes the default of the module. An error names each mistake by its dotted
key, and reports all mistakes of a section at once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cjepa_kernels.backends import names
from cjepa_kernels.definitions import SMALLEST
from cjepa_kernels.modules import ContrastiveJEPALoss, HJEPALoss
from cjepa_kernels.suggestions import nearest
from cjepa_kernels.yaml_reader import read_yaml

# Configuration key -> argument of the module.
JEPA_KEYS = {
    "jepa_loss_type": "loss_type",
    "hierarchy_weights": "hierarchy_weights",
    "num_hierarchies": "num_hierarchies",
    "normalize_embeddings": "normalize_embeddings",
    "target_norm": "target_norm",
    "smoothl1_beta": "smoothl1_beta",
    "huber_delta": "huber_delta",
    "detach_targets": "detach_targets",
    "reduction": "reduction",
    "eps": "eps",
}
CONTRASTIVE_KEYS = {
    "jepa_weight": "jepa_weight",
    "contrastive_type": "contrastive_type",
    "contrastive_weight": "contrastive_weight",
    "contrastive_temperature": "contrastive_temperature",
    "use_cosine_similarity": "use_cosine_similarity",
    "contrastive_on_context": "contrastive_on_context",
    "reduction": "reduction",
    "eps": "eps",
    "backend": "backend",
    "gather_distributed": "distributed",
    "strategy": "strategy",
}
LOSS_KEYS = {"type", "use_contrastive", *JEPA_KEYS, *CONTRASTIVE_KEYS}
BOOLEAN_KEYS = {
    "use_contrastive",
    "normalize_embeddings",
    "detach_targets",
    "use_cosine_similarity",
    "contrastive_on_context",
    "gather_distributed",
}
CJEPA_TYPES = ("cjepa", "contrastive_jepa")
JEPA_TYPES = ("hjepa", "jepa", "smoothl1", "mse")  # the last two name the loss type as well
# Ranges of a configuration's values. The modules take wider ranges; outside of these no training
# makes sense, and products of the values could leave the range of fp32.
RANGES: dict[str, tuple[float, float]] = {
    "jepa_weight": (0.0, 1e6),
    "contrastive_weight": (0.0, 1e6),
    "hierarchy_weights": (0.0, 1e6),
    "contrastive_temperature": (1e-4, 1e4),
    "smoothl1_beta": (1e-6, 1e6),
    "huber_delta": (1e-6, 1e6),
    "eps": (SMALLEST, 1.0),
    "num_hierarchies": (1, 32),
}
# Types of H-JEPA's files that this package does not have, and what to take instead.
_VICREG = (
    "there is no VICReg here; type 'hjepa' is the prediction term alone, and type 'cjepa' adds "
    "NT-Xent, which also keeps representations apart"
)
_SIGREG = _VICREG.replace("VICReg", "SIGReg")
FOREIGN_TYPES = {
    "combined": _VICREG,
    "hierarchical_combined": _VICREG,
    "vicreg": _VICREG,
    "sigreg": _SIGREG,
    "hjepa_sigreg": _SIGREG,
    "hybrid_vicreg_sigreg": _SIGREG,
    "lewm": "world models are not part of this package",
    "ijepa": "take type 'hjepa' with num_hierarchies: 1 and target_norm: layer",
    "huber": "take type 'hjepa' with jepa_loss_type: huber",
    "simclr": "take type 'cjepa' with jepa_weight: 0, or cjepa_kernels.NTXentLoss",
    "nt_xent": "take type 'cjepa' with jepa_weight: 0, or cjepa_kernels.NTXentLoss",
}


def create_loss_from_config(config: Mapping[str, Any] | str | Path) -> nn.Module:
    """Build a loss from a configuration.

    Args:
        config: A mapping, or the path of a YAML file: a whole experiment with a ``loss``
            section, or that section itself. ``type: "cjepa"`` (alias ``contrastive_jepa``)
            gives C-JEPA; ``hjepa``, ``jepa``, ``smoothl1`` or ``mse`` the JEPA loss alone, and
            C-JEPA as well when ``use_contrastive: true``. ``contrastive_type`` chooses among
            NT-Xent, DCL, InfoNCE and SupCon, whose labels go to the loss's ``forward``.
            ``num_hierarchies`` may stand in the ``model`` section, or follow from the length of
            ``hierarchy_weights``. Keys for VICReg and SIGReg, which H-JEPA ignores with these
            types, are ignored with a warning.

    Returns:
        ContrastiveJEPALoss or HJEPALoss.

    Raises:
        FileNotFoundError: No such file.
        ImportError: A path was given and PyYAML is missing.
        RuntimeError: ``backend`` names a back end that is missing on this machine.
        TypeError, ValueError: An unknown key or type, or a value that the loss does not take. Each
            mistake is a line that begins with its key, dotted if there is a ``loss`` section; the
            attribute ``problems`` has the lines.

    Example:
        >>> loss_fn = create_loss_from_config({"type": "cjepa", "contrastive_weight": 0.1})
        >>> loss_fn.contrastive_weight
        0.1
    """
    section, prefix = _loss_section(config)
    kind = _check(section, prefix)
    arguments = _arguments(section, JEPA_KEYS)
    if kind in ("smoothl1", "mse"):
        arguments.setdefault("loss_type", kind)
    jepa_loss = HJEPALoss(**arguments)
    if not section.get("use_contrastive", kind in CJEPA_TYPES):
        return jepa_loss
    return _wrap(section, prefix, jepa_loss)


def create_cjepa_loss_from_config(
    config: Mapping[str, Any] | str | Path, jepa_loss: nn.Module
) -> ContrastiveJEPALoss:
    """Wrap a JEPA loss that exists already into C-JEPA.

    Args:
        config: As for :func:`create_loss_from_config`; the keys of the JEPA loss are checked and
            not used, and ``use_contrastive`` makes no difference.
        jepa_loss: Module that returns a dict with ``loss``.

    Returns:
        ContrastiveJEPALoss around ``jepa_loss``.

    Raises:
        FileNotFoundError, ImportError, RuntimeError, TypeError, ValueError: As by
            :func:`create_loss_from_config`.
    """
    section, prefix = _loss_section(config)
    if section.get("use_contrastive") is False:
        del section["use_contrastive"]
    _check(section, prefix)
    return _wrap(section, prefix, jepa_loss)


def check_loss_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Raise unless a loss can be built from a configuration.

    Whether the back end is available here is not asked: an experiment may be read elsewhere.

    Args:
        config: As for :func:`create_loss_from_config`.

    Returns:
        The loss section without the keys that are ignored; a warning named them.

    Raises:
        TypeError, ValueError: As by :func:`create_loss_from_config`.
    """
    section, prefix = _loss_section(config)
    given = set(config.get("loss", config))
    _check(section, prefix)
    return {key: value for key, value in section.items() if key in given}


def _wrap(section: Mapping[str, Any], prefix: str, jepa_loss: nn.Module) -> ContrastiveJEPALoss:
    try:
        return ContrastiveJEPALoss(jepa_loss, **_arguments(section, CONTRASTIVE_KEYS))
    except RuntimeError as error:  # the back end is missing; everything else was checked
        raise RuntimeError(f"{prefix}backend: {error}") from None


def _loss_section(config: Mapping[str, Any] | str | Path) -> tuple[dict[str, Any], str]:
    """The loss section, and the prefix of its keys in messages."""
    if isinstance(config, (str, Path)):
        config = read_yaml(Path(config))
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping or a path, got {type(config).__name__}")
    prefix = "loss." if "loss" in config else ""
    section = config.get("loss", config)
    if not isinstance(section, Mapping):
        raise TypeError(f"loss: the loss section must be a mapping, got {shortened(repr(section))}")
    section = dict(section)
    model = config.get("model")
    if isinstance(model, Mapping) and "num_hierarchies" in model:
        levels = model["num_hierarchies"]
        if section.setdefault("num_hierarchies", levels) != levels:
            raise ValueError(
                f"{prefix}num_hierarchies: {section['num_hierarchies']!r} is not "
                f"model.num_hierarchies, which is {levels!r}"
            )
    weights = section.get("hierarchy_weights")
    if weights and "num_hierarchies" not in section and isinstance(weights, (list, tuple)):
        section["num_hierarchies"] = len(weights)
    return section, prefix


def _check(section: dict[str, Any], prefix: str) -> str:
    """Check every key, drop the keys that H-JEPA ignores as well, and return the type."""
    ignored = [key for key in section if isinstance(key, str) and _is_of_vicreg(key)]
    kind = section.get("type", "cjepa")
    if ignored and "type" not in section:
        raise ValueError(
            f"{prefix}type: missing beside {', '.join(ignored)}, where H-JEPA takes 'combined': "
            f"{_VICREG}"
        )
    if isinstance(kind, str) and kind.lower() in FOREIGN_TYPES:  # before its keys, also unknown
        raise ValueError(f"{prefix}type: no type {kind!r}: {FOREIGN_TYPES[kind.lower()]}")
    problems: list[tuple[str, Exception]] = []

    def check(key: str, function: Callable[[], object]) -> None:
        try:
            function()
        except (TypeError, ValueError, OverflowError) as error:
            problems.append((key, error))

    check("type", lambda: _check_type(kind))
    for key, value in section.items():
        if key not in ignored:
            check(str(key), functools.partial(_check_value, key, value))
    if not problems:
        if section.get("use_contrastive") is False and kind.lower() in CJEPA_TYPES:
            message = (
                f"must not be false with type {kind!r}: take type 'hjepa', or set "
                "contrastive_weight to 0"
            )
            problems.append(("use_contrastive", ValueError(message)))
        # This check concerns two keys: there must be as many weights as levels.
        check("hierarchy_weights", lambda: HJEPALoss(**_arguments(section, JEPA_KEYS)))
    if problems:
        lines = [
            f"{prefix}{shortened(key)}: {shortened(_without_key(key, error), 300)}"
            for key, error in problems
        ]
        wrong_types = all(isinstance(error, TypeError) for _, error in problems)
        raised: Any = (TypeError if wrong_types else ValueError)("\n".join(lines))
        raised.problems = lines
        raise raised
    if ignored:
        names = ", ".join(prefix + key for key in ignored)
        warnings.warn(
            f"{names}: ignored with type {kind!r}, as by H-JEPA; {_VICREG}",
            UserWarning,
            stacklevel=4,
        )
        for key in ignored:
            del section[key]
    return str(kind).lower()


def _is_of_vicreg(key: str) -> bool:
    return key.startswith(("vicreg", "sigreg")) or key in {
        "use_vicreg",
        "use_sigreg",
        "apply_vicreg_per_level",
        "flatten_patches",
    }


def _check_type(kind: object) -> None:
    known = CJEPA_TYPES + JEPA_TYPES
    if not isinstance(kind, str) or kind.lower() not in known:
        raise ValueError(f"no type {kind!r}{nearest(kind, known)}")


def _check_value(key: object, value: Any) -> None:
    """Check one key on its own: by its range here, and by the module that takes it."""
    if not isinstance(key, str) or key not in LOSS_KEYS:
        raise ValueError(f"unknown key{nearest(key, LOSS_KEYS)}")
    if key == "type":
        return
    if key in BOOLEAN_KEYS:
        if not isinstance(value, bool):
            raise TypeError(f"must be true or false, got {value!r}")
        return
    if key == "backend":
        if value not in names():
            raise ValueError(f"must be one of {list(names())}, got {value!r}")
        return
    if key in RANGES:
        _check_range(key, value)
    if key == "hierarchy_weights" and isinstance(value, (list, tuple)):
        HJEPALoss(hierarchy_weights=value, num_hierarchies=len(value))
        return
    if key in JEPA_KEYS:
        HJEPALoss(**{JEPA_KEYS[key]: value})
    if key in CONTRASTIVE_KEYS:
        ContrastiveJEPALoss(nn.Identity(), **{CONTRASTIVE_KEYS[key]: value})


def _check_range(key: str, value: Any) -> None:
    low, high = RANGES[key]
    several = key == "hierarchy_weights" and isinstance(value, (list, tuple))
    values = value if several else [value]
    if several and not 1 <= len(value) <= RANGES["num_hierarchies"][1]:
        raise ValueError(f"must hold 1 to {RANGES['num_hierarchies'][1]} weights, got {len(value)}")
    whole = key == "num_hierarchies"
    for number in values:
        if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
            expected = "a whole number" if whole else "a number"
            raise TypeError(f"must be {expected}, got {number!r}")
        if not low <= number <= high:
            raise ValueError(f"must lie between {low:g} and {high:g}, got {number!r}")


def _without_key(key: str, error: Exception) -> str:
    """The message without the argument's name, which the key in front of it replaces."""
    argument = {**JEPA_KEYS, **CONTRASTIVE_KEYS}.get(key, key)
    return str(error).removeprefix(f"{argument} ").removeprefix(f"{key} ")


def shortened(text: str, longest: int = 80) -> str:
    """A text with its middle left out if it is too long for a message."""
    if len(text) <= longest:
        return text
    return f"{text[: longest * 2 // 3]}...{text[-longest // 4 :]}"


def _arguments(section: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    return {argument: section[key] for key, argument in keys.items() if key in section}
