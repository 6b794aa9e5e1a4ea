"""The experiment's configuration: YAML files, ``key=value`` overrides, ranges and cross-checks."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
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

from cjepa_kernels.config import check_loss_section, shortened
from cjepa_kernels.definitions import CONTRASTIVE_WEIGHT, JEPA_WEIGHT, TEMPERATURE
from cjepa_kernels.suggestions import nearest
from cjepa_kernels.yaml_reader import parse_yaml, read_yaml

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Beta = Annotated[float, Field(ge=0.0, le=0.999999)]
Range = tuple[float, float]
# These values have no natural bound. The bounds are far above what anybody trains with. They catch
# a typing error before it uses up memory or time.
MOST_PIXELS = 4096  # of an image's side
MOST_PATCHES = 128 * 128  # of an image; the time of attention grows with their square
MOST_BLOCKS = 64
MOST_WIDTH = 8192
MOST_DEPTH = 256
MOST_PARAMETERS = 10**9  # of the encoder and the predictor together
MOST_ITEMS = 10**9  # of whatever is counted in images
MOST_EPOCHS = 10**6
MOST_BATCH = 10**6
MOST_DEVICES = 1024
MOST_THREADS = 256
MOST_DRAWS = 1000


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _types_are_as_written(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes` and `on` as booleans, which Python would silently take for 1. It reads a
        # quoted number as a text, and Pydantic would turn some texts into booleans.
        if info.field_name is not None:
            annotation = cls.model_fields[info.field_name].annotation
            kinds = _kinds(annotation)
            if kinds == {bool} and not isinstance(value, bool):
                raise ValueError("expected true or false")
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, bool) and bool not in kinds:
                    raise ValueError("a boolean is not expected here")
                if isinstance(item, str) and str not in kinds:
                    raise ValueError(f"expected {'a number' if float in kinds else 'an integer'}")
        return value


class DataConfig(_Section):
    """Images and labels, and how many of them."""

    source: str = "digits"
    image_column: str | None = Field(default=None, min_length=1)
    label_column: str | None = Field(default=None, min_length=1)
    image_size: int | None = Field(default=None, ge=1, le=MOST_PIXELS)
    bit_depth: int | None = Field(default=None, ge=8, le=16)
    train_size: int | None = Field(default=None, ge=2, le=MOST_ITEMS)
    test_size: int | None = Field(default=None, ge=1, le=MOST_ITEMS)
    pretrain_classes: list[int] | Literal["half"] | None = None

    @field_validator("source")
    @classmethod
    def _source_is_complete(cls, source: str) -> str:
        kind, separator, path = source.partition(":")
        if not source.strip() or (separator and kind in ("parquet", "imagefolder") and not path):
            raise ValueError("expected 'digits', 'parquet:PATH', 'imagefolder:PATH' or a name")
        return source

    @field_validator("pretrain_classes", mode="before")
    @classmethod
    def _classes_are_numbers(cls, classes: Any) -> Any:
        numbers = isinstance(classes, list) and all(type(item) is int for item in classes)
        if classes is not None and classes != "half" and not numbers:
            raise ValueError("expected 'half' or a list of class indices")
        return classes

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
    noise: Fraction = 0.025

    @field_validator("scale", "crop_ratio")
    @classmethod
    def _ranges_ascend(cls, bounds: Range) -> Range:
        return _ascending(bounds, 0.1, 10.0)

    @field_validator("crop_area")
    @classmethod
    def _crops_are_inside(cls, bounds: Range | None) -> Range | None:
        return None if bounds is None else _ascending(bounds, 0.01, 1.0)


def _count_or_fraction(value: Any) -> int | float:
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_PATCHES:
        return value
    if isinstance(value, float) and 0.0 < value < 1.0:
        return value
    raise ValueError(
        f"expected an integer from 1 to {MOST_PATCHES} (a number of patches) or a float strictly "
        "between 0 and 1 (a fraction of the patches)"
    )


CountOrFraction = Annotated[int | float, PlainValidator(_count_or_fraction)]


class MaskingConfig(_Section):
    """Multi-block masks with fixed numbers of visible and predicted patches.

    An integer is a number of patches, a float between 0 and 1 a fraction of the patches.
    """

    visible: CountOrFraction = 0.625
    predicted: CountOrFraction = 0.25
    blocks: int = Field(default=4, ge=1, le=MOST_BLOCKS)
    block_scale: Range = (0.15, 0.2)
    block_ratio: Range = (2.0 / 3.0, 1.5)

    @field_validator("block_scale")
    @classmethod
    def _blocks_are_inside(cls, bounds: Range) -> Range:
        return _ascending(bounds, 0.001, 1.0)

    @field_validator("block_ratio")
    @classmethod
    def _ranges_ascend(cls, bounds: Range) -> Range:
        return _ascending(bounds, 0.1, 10.0)


class ModelConfig(_Section):
    """Vision transformer and predictor."""

    patch_size: int = Field(default=2, ge=1, le=MOST_PIXELS)
    dim: int = Field(default=64, ge=4, le=MOST_WIDTH)
    depth: int = Field(default=2, ge=1, le=MOST_DEPTH)
    heads: int = Field(default=4, ge=1, le=MOST_WIDTH)
    mlp_ratio: float = Field(default=4.0, ge=0.25, le=16.0)
    position_scale: float = Field(default=0.5, ge=0.001, le=100.0)
    predictor_dim: int = Field(default=32, ge=4, le=MOST_WIDTH)
    predictor_depth: int = Field(default=1, ge=1, le=MOST_DEPTH)
    predictor_heads: int = Field(default=4, ge=1, le=MOST_WIDTH)

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
        if (parameters := self._parameters()) > MOST_PARAMETERS:
            raise ValueError(
                "expected dim, depth, mlp_ratio and those of the predictor to give at most "
                f"{MOST_PARAMETERS:,} parameters, got about {parameters:,}"
            )
        return self

    def _parameters(self) -> int:
        """Parameters of the blocks of encoder and predictor; the rest is small beside them."""
        sizes = ((self.dim, self.depth), (self.predictor_dim, self.predictor_depth))
        return sum(depth * round((4 + 2 * self.mlp_ratio) * dim**2) for dim, depth in sizes)


class OptimizerConfig(_Section):
    """AdamW, its schedule, and the momentum of the target encoder."""

    learning_rate: float = Field(default=2e-3, ge=1e-12, le=1e3)
    min_learning_rate: float = Field(default=1e-5, ge=0.0, le=1e3)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(default=0.05, ge=0.0, le=100.0)
    gradient_clip: float | None = Field(default=3.0, ge=1e-6, le=1e6)
    warmup_fraction: float = Field(default=0.1, ge=0.0, le=0.99)
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

    epochs: int = Field(default=40, ge=1, le=MOST_EPOCHS)
    batch_size: int = Field(default=64, ge=1, le=MOST_BATCH)
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "cpu"
    devices: int = Field(default=1, ge=1, le=MOST_DEVICES)
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    threads: int | None = Field(default=1, ge=1, le=MOST_THREADS)
    keep_every_n_epochs: int = Field(default=0, ge=0, le=MOST_EPOCHS)

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

    every_n_epochs: int = Field(default=0, ge=0, le=MOST_EPOCHS)
    few_labels: int = Field(default=10, ge=1, le=MOST_ITEMS)
    few_label_draws: int = Field(default=10, ge=1, le=MOST_DRAWS)
    knn_k: int = Field(default=10, ge=1, le=MOST_ITEMS)
    probe_l2: float | None = Field(default=None, ge=1e-6, le=1e6)
    robustness: bool = True
    max_train_images: int | None = Field(default=10000, ge=1, le=MOST_ITEMS)


class LoggingConfig(_Section):
    """Where the metrics go besides ``metrics.csv``."""

    tensorboard: bool = True
    progress_bar: bool = True


_DEFAULT_LOSS: dict[str, Any] = {
    "type": "cjepa",
    "contrastive_weight": CONTRASTIVE_WEIGHT,
    "contrastive_temperature": TEMPERATURE,
    "contrastive_on_context": True,
    "gather_distributed": True,
    "jepa_weight": JEPA_WEIGHT,
    "jepa_loss_type": "smoothl1",
    "hierarchy_weights": [1.0, 0.5, 0.25],
    "num_hierarchies": 3,
    "target_norm": "layer",
}


class ExperimentConfig(_Section):
    """A complete experiment. :func:`config_from_dict` has the loss factory check ``loss``."""

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
    problems: list[str] = []
    if isinstance(loss := merged.get("loss"), Mapping):
        try:
            merged["loss"] = check_loss_section({"loss": loss})
        except (TypeError, ValueError) as error:
            problems += getattr(error, "problems", [str(error)])
    try:
        config = ExperimentConfig.model_validate(merged)
    except ValidationError as error:
        problems = [*_described(error.errors()), *problems]
    if problems:
        raise ConfigurationError(origin, problems)
    return config


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


def uses_labels(config: ExperimentConfig) -> bool:
    """Whether the pretraining itself uses the labels of the images.

    Args:
        config: The experiment.

    Returns:
        True for SupCon with a weight; the probes use labels in every experiment.
    """
    weight = config.loss.get("contrastive_weight", CONTRASTIVE_WEIGHT)
    return bool(config.loss.get("contrastive_type") == "sup_con" and weight)


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


def _kinds(annotation: Any) -> set[type]:
    """The types in an annotation: {float} for a pair of floats, {str} for a choice of words."""
    if typing.get_origin(annotation) is Literal:
        return {type(value) for value in typing.get_args(annotation)}
    inner = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    return set().union(*map(_kinds, inner)) if inner else {annotation}


def _ascending(bounds: Range, least: float, most: float) -> Range:
    if not least <= bounds[0] <= bounds[1] <= most:
        raise ValueError(f"expected [low, high] with {least:g} <= low <= high <= {most:g}")
    return bounds


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()
    }


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    path = key.strip().split(".")
    shown = _shown(override)
    if not separator or not all(path):
        raise ValueError(f"override {shown}: expected key=value, as in trainer.epochs=5")
    if len(path) > 2:
        raise ValueError(f"override {shown}: expected section.key=value, got {len(path)} names")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"override {shown}: the value is not valid YAML: {error}") from error
    section = values
    for position, name in enumerate(path[:-1]):
        nested = section.setdefault(name, {})
        if not isinstance(nested, dict):
            parent = ".".join(path[: position + 1])
            raise ValueError(f"override {shown}: {parent} is a value, not a section")
        section = nested
    section[path[-1]] = value


def _described(problems: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line for each key, also if several items of a list are wrong."""
    lines: dict[str, str] = {}
    for problem in problems:
        location = [shortened(str(part)) for part in problem["loc"][:2]]
        lines.setdefault(".".join(location) or "configuration", _describe(problem, location))
    return list(lines.values())


def _describe(problem: Mapping[str, Any], location: Sequence[str]) -> str:
    key = ".".join(location) or "configuration"
    if problem["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        return f"{key}: unknown key{nearest(location[-1], known)}"
    if problem["type"] in ("missing", "too_long"):  # of a pair of numbers: no key is required
        return f"{key}: expected two numbers, got {_shown(problem['input'])}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "value_error" and ", got " in message:
        return f"{key}: {message}"
    if problem["type"] in ("model_type", "dict_type"):
        message = "expected a section of keys and values"
    message = message.replace("Input should be ", "expected ").replace("Input should", "it should")
    return f"{key}: {message[:1].lower()}{message[1:]}, got {_shown(problem['input'])}"


def _shown(value: object) -> str:
    return shortened(repr(value))


def _known_keys(path: Sequence[str]) -> list[str]:
    model: type[BaseModel] = ExperimentConfig
    for name in path:
        annotation = model.model_fields[name].annotation
        if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
            model = annotation
    return list(model.model_fields)
