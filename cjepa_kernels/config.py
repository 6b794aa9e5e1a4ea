"""Losses from a configuration: a mapping or a YAML file.

Defaults are those of the modules: a key that is absent is not passed on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

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
    "huber_delta": "huber_delta",
    "detach_targets": "detach_targets",
    "reduction": "reduction",
    "eps": "eps",
}
CONTRASTIVE_KEYS = {
    "jepa_weight": "jepa_weight",
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


def create_loss_from_config(config: Mapping[str, Any] | str | Path) -> nn.Module:
    """Build a loss from a configuration.

    Args:
        config: A mapping, or the path of a YAML file: a whole experiment with a ``loss``
            section, or that section itself. ``type: "cjepa"`` (alias ``contrastive_jepa``)
            gives C-JEPA; ``hjepa``, ``jepa``, ``smoothl1`` or ``mse`` the JEPA loss alone, and
            C-JEPA as well when ``use_contrastive: true``. ``num_hierarchies`` may stand in the
            ``model`` section, or follow from the length of ``hierarchy_weights``.

    Returns:
        ContrastiveJEPALoss or HJEPALoss.

    Raises:
        FileNotFoundError: No such file.
        ImportError: A path was given and PyYAML is missing.
        TypeError, ValueError: An unknown key or type (the nearest known one is named), or a value
            that the loss does not take.

    Example:
        >>> loss_fn = create_loss_from_config({"type": "cjepa", "contrastive_weight": 0.1})
        >>> loss_fn.contrastive_weight
        0.1
    """
    section = _loss_section(config)
    kind = _loss_type(section)
    arguments = _arguments(section, JEPA_KEYS)
    if kind in ("smoothl1", "mse"):
        arguments.setdefault("loss_type", kind)
    jepa_loss = HJEPALoss(**arguments)
    contrastive = section.get("use_contrastive", kind in CJEPA_TYPES)
    if not contrastive and kind in CJEPA_TYPES:
        raise ValueError(
            f"use_contrastive must not be false with type {kind!r}: take type 'hjepa', or set "
            "contrastive_weight to 0"
        )
    return create_cjepa_loss_from_config(section, jepa_loss) if contrastive else jepa_loss


def create_cjepa_loss_from_config(
    config: Mapping[str, Any] | str | Path, jepa_loss: nn.Module
) -> ContrastiveJEPALoss:
    """Wrap a JEPA loss that exists already into C-JEPA.

    Args:
        config: As for :func:`create_loss_from_config`; the keys of the JEPA loss are ignored.
        jepa_loss: Module that returns a dict with ``loss``.

    Returns:
        ContrastiveJEPALoss around ``jepa_loss``.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: As by
            :func:`create_loss_from_config`.
    """
    section = _loss_section(config)
    _loss_type(section)
    return ContrastiveJEPALoss(jepa_loss, **_arguments(section, CONTRASTIVE_KEYS))


def _loss_section(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(config, (str, Path)):
        config = read_yaml(Path(config))
    if not isinstance(config, Mapping):
        raise TypeError(f"config must be a mapping or a path, got {type(config).__name__}")
    section = config.get("loss", config)
    if not isinstance(section, Mapping):
        raise TypeError(f"the loss section must be a mapping, got {section!r}")
    section = dict(section)
    for key in section:
        if key not in LOSS_KEYS:
            raise ValueError(f"unknown key {key!r} in the loss section{nearest(key, LOSS_KEYS)}")
    for key in BOOLEAN_KEYS & set(section):
        if not isinstance(section[key], bool):
            raise TypeError(f"{key} must be true or false, got {section[key]!r}")
    model = config.get("model")
    weights = section.get("hierarchy_weights")
    if "num_hierarchies" not in section:
        if isinstance(model, Mapping) and "num_hierarchies" in model:
            section["num_hierarchies"] = model["num_hierarchies"]
        elif isinstance(weights, (list, tuple)):
            section["num_hierarchies"] = len(weights)
    return section


def _loss_type(section: Mapping[str, Any]) -> str:
    kind = section.get("type", "cjepa")
    if not isinstance(kind, str) or kind.lower() not in CJEPA_TYPES + JEPA_TYPES:
        raise ValueError(f"unknown loss type {kind!r}{nearest(kind, CJEPA_TYPES + JEPA_TYPES)}")
    return kind.lower()


def _arguments(section: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    return {argument: section[key] for key, argument in keys.items() if key in section}
