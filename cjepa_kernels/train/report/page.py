"""The report of a comparison: one HTML file without scripts and without a network.

This module computes what the report shows; the text around it is in ``page.html.jinja``.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import numpy.typing as npt
import torch
import yaml
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from cjepa_kernels.files import atomic_write
from cjepa_kernels.train.data.dataset import Dataset
from cjepa_kernels.train.evaluation.comparison import (
    ARM_TITLES,
    HEADLINE_TITLES,
    METRIC_TITLES,
    Comparison,
)
from cjepa_kernels.train.evaluation.features import FeatureExtractor, Features
from cjepa_kernels.train.report import figures
from cjepa_kernels.train.report.tables import (
    labels_per_class,
    notes_of,
    pair_title,
    plain,
    text_tables,
)

Array = npt.NDArray[np.float32]

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("cjepa_kernels.train", "report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,  # a misspelt name in the template is an error
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_QUERIES = 10
_NEIGHBOURS = 8
_MAX_GALLERY = 10_000  # training images among which neighbours are searched
_MAX_SIDE = 64  # larger pictures are scaled down, to keep the file small
_TRAINED = ("jepa", "contrastive", "cjepa")


def write_report(
    comparison: Comparison,
    dataset: Dataset,
    extractors: Mapping[str, FeatureExtractor],
    path: Path,
) -> None:
    """Write the report of a comparison as one self-contained HTML file.

    Args:
        comparison: What was measured.
        dataset: The images that the encoders are shown on.
        extractors: One frozen encoder per arm, and optionally ``"untrained"``; arms without one
            are left out of the pictures.
        path: File to write; it is replaced as a whole or not at all.

    Raises:
        ValueError: If an extractor's name is not that of an arm.
    """
    unknown = [name for name in extractors if name not in ARM_TITLES]
    if unknown:
        raise ValueError(
            f"extractors must be named among {', '.join(ARM_TITLES)}, got {', '.join(unknown)}"
        )
    page = _TEMPLATES.get_template("page.html.jinja").render(
        title=f"C-JEPA compared on {comparison.dataset}",
        comparison=comparison,
        seeds=len(comparison.seeds),
        epochs=comparison.config.get("trainer", {}).get("epochs", "?"),
        sizes=comparison.probes.get("all"),
        tiles=_tiles(comparison),
        tables=(tables := text_tables(comparison)),
        notes=notes_of(tables),
        probes=_probes(comparison),
        paired_figure=Markup(figures.paired_figure(comparison)),
        curves_figure=Markup(figures.curves_figure(comparison)),
        robustness_figure=Markup(figures.robustness_figure(comparison)),
        projection=_projection(dataset, extractors),
        neighbours=_neighbours(dataset, extractors),
        findings=_findings(comparison),
        pairs=_pairs(comparison),
        configuration=yaml.safe_dump(comparison.config, sort_keys=False, allow_unicode=True),
        environment=_environment(comparison),
    )
    atomic_write(path, page)


class _Difference(NamedTuple):
    """By how much C-JEPA is ahead of another arm."""

    value: str
    arm: str


class _Tile(NamedTuple):
    """A metric at the head of the report."""

    title: str
    differences: list[_Difference]


def _tiles(comparison: Comparison) -> list[_Tile]:
    tiles = []
    for key, title in HEADLINE_TITLES.items():
        differences = [
            _Difference(by_metric[key].format(signed=True), ARM_TITLES[pair.split(" - ")[1]])
            for pair, by_metric in comparison.paired.items()
            if pair.startswith("cjepa - ") and key in by_metric
        ]
        if differences:
            tiles.append(_Tile(title, differences))
    return tiles


class _Probes(NamedTuple):
    """The sizes of the probes, as the text below the tables names them."""

    labels: str
    draws: int
    neighbours: str


def _probes(comparison: Comparison) -> _Probes:
    sizes = comparison.probes.get("all")
    if sizes is not None:
        return _Probes(labels_per_class(sizes), sizes.draws, str(sizes.neighbours))
    config = comparison.config.get("evaluation", {})
    return _Probes(
        labels=f"at most {config.get('few_labels', 10)} labels per class",
        draws=config.get("few_label_draws", 10),
        neighbours=f"at most {config.get('knn_k', 10)}",
    )


def _both_features(extract: FeatureExtractor, images: Tensor) -> dict[str, Array]:
    features = Features(*extract(images))
    return {
        "mean": features.mean.float().cpu().numpy(),
        "cls": features.cls.float().cpu().numpy(),
    }


class _Projection(NamedTuple):
    """The projected features of the test images."""

    figure: Markup
    images: int


def _projection(dataset: Dataset, extractors: Mapping[str, FeatureExtractor]) -> _Projection | None:
    """None if there is no encoder, or too few images for a projection."""
    shown = {
        row: _both_features(extractors[row], dataset.test.images)
        for row in ("untrained", *_TRAINED)
        if row in extractors
    }
    if not shown or len(dataset.test.images) < 4:
        return None
    labels = dataset.test.labels.numpy()
    svg = figures.projection_figure(shown, labels, dataset.class_names)
    return _Projection(Markup(svg), min(len(labels), figures.MAX_POINTS))


def _image(pixels: Tensor) -> str:
    """A data URI of one uint8 image (C, H, W)."""
    array = pixels.permute(1, 2, 0).numpy()
    if array.shape[2] not in (1, 3):
        array = array[:, :, :1]
    picture = Image.fromarray(
        array[:, :, 0] if array.shape[2] == 1 else np.ascontiguousarray(array)
    )
    if max(picture.size) > _MAX_SIDE:
        picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def nearest_neighbours(queries: Array, gallery: Array, k: int) -> npt.NDArray[np.int64]:
    """Indices of the nearest gallery features, by cosine after the gallery's mean is subtracted.

    Args:
        queries: (n, D), fp32.
        gallery: (N, D), fp32.
        k: Neighbours per query, at most N of them are returned.

    Returns:
        (n, min(k, N)), int64, nearest first.
    """
    mean = gallery.mean(axis=0)
    a = torch.nn.functional.normalize(torch.from_numpy(queries - mean), dim=1)
    b = torch.nn.functional.normalize(torch.from_numpy(gallery - mean), dim=1)
    nearest: npt.NDArray[np.int64] = (a @ b.T).topk(min(k, len(b)), dim=1).indices.numpy()
    return nearest


class _Picture(NamedTuple):
    """An image with its class, and whether that is the class of the query."""

    name: str
    uri: str
    of_same_class: bool = True


class _Strip(NamedTuple):
    """A test image and the training images that are nearest to it."""

    query: _Picture
    neighbours: list[_Picture]


@dataclass(frozen=True)
class _ArmNeighbours:
    """The neighbours of every query by the features of one arm."""

    title: str
    strips: list[_Strip]

    @property
    def hits(self) -> int:
        """Neighbours that have the class of their query."""
        return sum(picture.of_same_class for strip in self.strips for picture in strip.neighbours)

    @property
    def total(self) -> int:
        return sum(len(strip.neighbours) for strip in self.strips)


class _Neighbours(NamedTuple):
    """The nearest neighbours by the features of every arm."""

    by_arm: list[_ArmNeighbours]
    classes: int
    per_query: int


def _neighbours(dataset: Dataset, extractors: Mapping[str, FeatureExtractor]) -> _Neighbours | None:
    """None if there is no trained encoder."""
    test, train, names = dataset.test, dataset.train, dataset.class_names
    classes = torch.unique(test.labels)[:_QUERIES]
    queries = torch.tensor([int((test.labels == c).nonzero()[0]) for c in classes])
    gallery = torch.arange(len(train.images))
    if len(gallery) > _MAX_GALLERY:
        chosen = np.random.RandomState(0).permutation(len(gallery))[:_MAX_GALLERY]
        gallery = torch.from_numpy(np.sort(chosen))
    by_arm = []
    for arm in _TRAINED:
        if arm not in extractors:
            continue
        query_features = _both_features(extractors[arm], test.images[queries])["mean"]
        gallery_features = _both_features(extractors[arm], train.images[gallery])["mean"]
        nearest = nearest_neighbours(query_features, gallery_features, _NEIGHBOURS)
        strips = []
        for query, row in zip(queries.tolist(), nearest, strict=True):
            label = int(test.labels[query])
            neighbours = [
                _Picture(
                    name=names[int(train.labels[index])],
                    uri=_image(train.images[index]),
                    of_same_class=int(train.labels[index]) == label,
                )
                for index in gallery[torch.from_numpy(row)].tolist()
            ]
            strips.append(_Strip(_Picture(names[label], _image(test.images[query])), neighbours))
        by_arm.append(_ArmNeighbours(ARM_TITLES[arm], strips))
    if not by_arm:
        return None
    return _Neighbours(by_arm, len(classes), min(_NEIGHBOURS, len(gallery)))


class _Evidence(NamedTuple):
    """The numbers of one run behind a finding."""

    seed: int
    epoch: int
    text: str


class _Finding(NamedTuple):
    """A finding of the advisor about the runs of one arm."""

    arm: str
    rule: str
    message: str
    note: str
    evidence: list[_Evidence]


def _findings(comparison: Comparison) -> list[_Finding]:
    """The findings of all runs, one for each arm and rule."""
    findings: dict[tuple[str, str], _Finding] = {}
    for run in comparison.runs:
        for entry in run.findings:
            rule = str(entry["rule"])
            finding = _Finding(
                arm=ARM_TITLES[run.arm],
                rule=rule.replace("_", " "),
                message=str(entry["message"]),
                note=str(entry.get("note", "")),
                evidence=[],
            )
            evidence = _Evidence(run.seed, int(entry["epoch"]), str(entry["evidence"]))
            findings.setdefault((run.arm, rule), finding).evidence.append(evidence)
    return [finding for _, finding in sorted(findings.items())]


class _Pair(NamedTuple):
    """The differences between two arms, for every metric and seed."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]


def _pairs(comparison: Comparison) -> list[_Pair]:
    columns = ("metric", "difference", *(f"seed {seed}" for seed in comparison.seeds))
    return [
        _Pair(
            title=pair_title(pair),
            columns=columns,
            rows=[
                (_metric_name(key), value.format(signed=True), *(f"{v:+.1f}" for v in value.values))
                for key, value in differences.items()
            ],
        )
        for pair, differences in comparison.paired.items()
    ]


def _environment(comparison: Comparison) -> dict[str, str]:
    seconds = sum(run.seconds for run in comparison.runs)
    return {
        **{key: plain(value) for key, value in comparison.environment.items()},
        "training time, all runs": f"{seconds:.0f} s",
    }


def _metric_name(key: str) -> str:
    features, _, metric = key.partition("/")
    return f"{features}: {METRIC_TITLES.get(metric, metric.replace('_', ' '))}" + (
        " (transfer)" if metric.startswith("transfer_") else ""
    )
