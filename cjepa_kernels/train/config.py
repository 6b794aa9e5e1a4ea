"""The experiment's configuration: YAML files, ``key=value`` overrides, ranges and cross-checks."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from cjepa_kernels.suggestions import nearest
from cjepa_kernels.yaml_reader import parse_yaml, read_yaml

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Range = tuple[float, float]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_from_a_bool(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML's `yes` and `on` are booleans, which Python would silently take for 1.
        if isinstance(value, bool) and info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            if annotation is not bool and bool not in typing.get_args(annotation):
                raise ValueError("a boolean is not expected here")
        return value


class DataConfig(_Section):
    """Images and labels, and how many of them."""

    source: str = "digits"
    image_column: str | None = None
    label_column: str | None = None
    image_size: int | None = Field(default=None, ge=1)
    bit_depth: int | None = Field(default=None, ge=8, le=16)
    train_size: int | None = Field(default=None, ge=2)
    test_size: int | None = Field(default=None, ge=1)
    pretrain_classes: list[int] | Literal["half"] | None = None

    @field_validator("source")
    @classmethod
    def _source_is_complete(cls, source: str) -> str:
        kind, separator, path = source.partition(":")
        if not source.strip() or (separator and kind in ("parquet", "imagefolder") and not path):
            raise ValueError("expected 'digits', 'parquet:PATH', 'imagefolder:PATH' or a name")
        return source

    @field_validator("pretrain_classes")
    @classmethod
    def _classes_are_distinct(cls, classes: Any) -> Any:
        if isinstance(classes, list):
            if not classes:
                raise ValueError("expected at least one class")
            if min(classes) < 0 or len(set(classes)) < len(classes):
                raise ValueError("expected distinct class indices >= 0")
            return sorted(classes)
        return classes


class ViewsConfig(_Section):
    """Random augmentation that turns an image into two views."""

    rotation: float = Field(default=8.0, ge=0.0, le=180.0)
    scale: Range = (0.95, 1.05)
    shift: float = Field(default=0.06, ge=0.0, le=1.0)
    crop_area: Range | None = None
    crop_ratio: Range = (0.75, 4.0 / 3.0)
    flip: Fraction = 0.0
    brightness: Fraction = 0.1
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    grayscale: Fraction = 0.0
    noise: float = Field(default=0.025, ge=0.0)

    @field_validator("scale", "crop_area", "crop_ratio")
    @classmethod
    def _ranges_ascend(cls, bounds: Range | None) -> Range | None:
        return _ascending(bounds)

    @field_validator("crop_area")
    @classmethod
    def _crops_are_inside(cls, bounds: Range | None) -> Range | None:
        if bounds is not None and bounds[1] > 1.0:
            raise ValueError("expected fractions of the image's area, at most 1")
        return bounds


def _count_or_fraction(value: Any) -> int | float:
    if isinstance(value, str):  # YAML reads 5e-1 as text
        with suppress(ValueError):
            value = float(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if isinstance(value, float) and 0.0 < value < 1.0:
        return value
    raise ValueError(
        "expected an integer >= 1 (a number of patches) or a float strictly between 0 and 1 (a "
        "fraction of the patches)"
    )


CountOrFraction = Annotated[int | float, PlainValidator(_count_or_fraction)]


class MaskingConfig(_Section):
    """Multi-block masks with fixed numbers of visible and predicted patches.

    An integer is a number of patches, a float between 0 and 1 a fraction of the patches.
    """

    visible: CountOrFraction = 0.625
    predicted: CountOrFraction = 0.25
    blocks: int = Field(default=4, ge=1)
    block_scale: Range = (0.15, 0.2)
    block_ratio: Range = (2.0 / 3.0, 1.5)

    @field_validator("block_scale", "block_ratio")
    @classmethod
    def _ranges_ascend(cls, bounds: Range) -> Range:
        _ascending(bounds)
        return bounds


class ModelConfig(_Section):
    """Vision transformer and predictor."""

    patch_size: int = Field(default=2, ge=1)
    dim: int = Field(default=64, ge=4)
    depth: int = Field(default=2, ge=1)
    heads: int = Field(default=4, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0.0)
    position_scale: float = Field(default=0.5, gt=0.0)
    predictor_dim: int = Field(default=32, ge=4)
    predictor_depth: int = Field(default=1, ge=1)
    predictor_heads: int = Field(default=4, ge=1)

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        for dim, heads in (("dim", "heads"), ("predictor_dim", "predictor_heads")):
            if getattr(self, dim) % getattr(self, heads):
                raise ValueError(
                    f"{heads} must divide {dim}, got {heads}={getattr(self, heads)} "
                    f"and {dim}={getattr(self, dim)}"
                )
            if getattr(self, dim) % 4:
                raise ValueError(
                    f"{dim} must be a multiple of 4 for sine-cosine positions, "
                    f"got {getattr(self, dim)}"
                )
        return self


class OptimizerConfig(_Section):
    """AdamW, its schedule, and the momentum of the target encoder."""

    learning_rate: float = Field(default=2e-3, gt=0.0)
    min_learning_rate: float = Field(default=1e-5, ge=0.0)
    betas: tuple[
        Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]
    ] = (0.9, 0.95)
    weight_decay: float = Field(default=0.05, ge=0.0)
    gradient_clip: float | None = Field(default=3.0, gt=0.0)
    warmup_fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    ema_start: Fraction = 0.99
    ema_end: Fraction = 1.0

    @model_validator(mode="after")
    def _rates_descend(self) -> OptimizerConfig:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                "min_learning_rate must not exceed learning_rate, "
                f"got {self.min_learning_rate} > {self.learning_rate}"
            )
        return self


class TrainerConfig(_Section):
    """The loop: epochs, batches, devices, precision."""

    epochs: int = Field(default=40, ge=1)
    batch_size: int = Field(default=64, ge=1)
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "cpu"
    devices: int = Field(default=1, ge=1)
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    threads: int | None = Field(default=1, ge=1)
    keep_every_n_epochs: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _devices_share_the_batch(self) -> TrainerConfig:
        if self.batch_size % self.devices:
            raise ValueError(
                "batch_size counts the pairs of all devices and must be divisible by their "
                f"number, got batch_size={self.batch_size} and devices={self.devices}"
            )
        return self


class EvaluationConfig(_Section):
    """Probes of the frozen encoder."""

    every_n_epochs: int = Field(default=0, ge=0)
    few_labels: int = Field(default=10, ge=1)
    few_label_draws: int = Field(default=10, ge=1)
    knn_k: int = Field(default=10, ge=1)
    probe_l2: float | None = Field(default=None, gt=0.0)
    robustness: bool = True
    max_train_images: int | None = Field(default=10000, ge=1)


class LoggingConfig(_Section):
    """Where the metrics go besides ``metrics.csv``."""

    tensorboard: bool = True
    progress_bar: bool = True


_DEFAULT_LOSS: dict[str, Any] = {
    "type": "cjepa",
    "contrastive_weight": 0.1,
    "contrastive_temperature": 0.1,
    "contrastive_on_context": True,
    "gather_distributed": True,
    "jepa_weight": 1.0,
    "jepa_loss_type": "smoothl1",
    "hierarchy_weights": [1.0, 0.5, 0.25],
    "num_hierarchies": 3,
    "target_norm": "layer",
}


class ExperimentConfig(_Section):
    """A complete experiment. The ``loss`` section is checked by the loss factory."""

    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    data: DataConfig = DataConfig()
    views: ViewsConfig = ViewsConfig()
    masking: MaskingConfig = MaskingConfig()
    model: ModelConfig = ModelConfig()
    loss: dict[str, Any] = Field(default_factory=lambda: dict(_DEFAULT_LOSS))
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()


class ConfigurationError(ValueError):
    """A configuration with mistakes.

    Args:
        origin: What the message calls the configuration.
        problems: One line for each mistake, with the dotted key first.
    """

    def __init__(self, origin: str, problems: Sequence[str]) -> None:
        super().__init__("\n  ".join([f"{origin} is not valid:", *problems]))
        self.problems = tuple(problems)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read an experiment from a YAML file.

    Args:
        path: YAML file with the sections of :class:`ExperimentConfig`.
        overrides: Items ``"section.key=value"``; the values are parsed as YAML.

    Returns:
        The validated experiment.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the YAML is malformed, a key unknown or a value out of range; the message
            has one line per problem.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no configuration file {str(file)!r}")
    values = read_yaml(file)
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise ValueError(f"{file}: expected a mapping of sections, got {type(values).__name__}")
    return config_from_dict(values, overrides, origin=str(file))


def config_from_dict(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, origin: str = "configuration"
) -> ExperimentConfig:
    """Validate an experiment that is a mapping already.

    Args:
        values: The sections of :class:`ExperimentConfig`.
        overrides: Items ``"section.key=value"``; the values are parsed as YAML.
        origin: What the error message calls the mapping.

    Returns:
        The validated experiment.

    Raises:
        ValueError: If a key is unknown or a value out of range, one line per problem.
    """
    merged = _copy(values)
    for override in overrides:
        _apply_override(merged, override)
    try:
        return ExperimentConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigurationError(origin, [_describe(p) for p in error.errors()]) from None


def apply_overrides(config: ExperimentConfig, overrides: Sequence[str]) -> ExperimentConfig:
    """Return a validated copy of an experiment with some values replaced.

    Args:
        config: The experiment.
        overrides: Items ``"section.key=value"``; the values are parsed as YAML.

    Returns:
        The new experiment.

    Raises:
        ValueError: If a key is unknown or a value out of range.
    """
    return config_from_dict(config_to_dict(config), overrides, origin="configuration")


def config_to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """Return an experiment as plain Python values, ready for YAML, JSON or a checkpoint.

    Args:
        config: The experiment.

    Returns:
        Nested dictionaries of numbers, strings, booleans, lists and None.
    """
    return config.model_dump(mode="json")


def differing_keys(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the dotted keys in which two nested mappings differ.

    Args:
        a: First mapping.
        b: Second mapping.
        prefix: Dotted path of both, for the recursion.

    Returns:
        Lines ``"key: value in a -> value in b"``.
    """
    lines: list[str] = []
    for key in [*a, *(key for key in b if key not in a)]:
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            lines += differing_keys(left, right, f"{prefix}{key}.")
        elif left != right:
            lines.append(f"{prefix}{key}: {left!r} -> {right!r}")
    return lines


def _ascending(bounds: Range | None) -> Range | None:
    if bounds is not None and not 0.0 < bounds[0] <= bounds[1]:
        raise ValueError("expected [low, high] with 0 < low <= high")
    return bounds


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()
    }


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    path = key.strip().split(".")
    if not separator or not all(path):
        raise ValueError(f"override {override!r}: expected key=value, as in trainer.epochs=5")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        shown = override if len(override) <= 80 else f"{override[:79]}…"
        raise ValueError(f"override {shown!r}: the value is not valid YAML: {error}") from error
    section = values
    for position, name in enumerate(path[:-1]):
        nested = section.setdefault(name, {})
        if not isinstance(nested, dict):
            parent = ".".join(path[: position + 1])
            raise ValueError(f"override {override!r}: {parent} is a value, not a section")
        section = nested
    section[path[-1]] = value


def _describe(problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"] if not _is_union_branch(part)]
    key = ".".join(location) or "configuration"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        return f"{key}: unknown key{nearest(location[-1], known)}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error" and ", got " in message:
        return f"{key}: {message}"
    return f"{key}: {message[:1].lower()}{message[1:]}, got {problem['input']!r}"


def _is_union_branch(part: object) -> bool:
    return isinstance(part, str) and ("[" in part or part == "none")


def _known_keys(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = ExperimentConfig
    for name in path:
        annotation = model.model_fields[name].annotation
        if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
            model = annotation
    return list(model.model_fields)
