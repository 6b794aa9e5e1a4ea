"""The figures of a comparison's report, as SVG that follows the page's light or dark colours."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from cjepa_kernels.plot_style import GRID, INK, settings, svg_with_colours
from cjepa_kernels.train.evaluation import corruptions
from cjepa_kernels.train.evaluation.comparison import (
    ARM_TITLES,
    FEATURE_TITLES,
    HEADLINE_TITLES,
    SHORT_FEATURE_TITLES,
    Comparison,
)

Array = npt.NDArray[np.float32]

# Okabe-Ito hues that are readable on white and on near-black. Dashes tell the arms apart as well.
_STYLES: dict[str, tuple[str, Any]] = {
    "cjepa": ("#2b83ba", "-"),
    "jepa": ("#d97706", "--"),
    "contrastive": ("#1f9d78", "-."),
    "untrained": ("#8b8f98", ":"),
    "pixels": ("#b05fa5", (0, (1, 1))),
}
_CLASS_COLOURS = (
    *("#2b83ba", "#d97706", "#1f9d78", "#c0504d", "#8e6bbf"),
    *("#9a6b4f", "#d977b8", "#7f8c3b", "#4db6c6", "#8b8f98"),
)
MAX_POINTS = 1000
_SETTINGS = {**settings(INK, GRID), "figure.constrained_layout.h_pad": 0.09}


def _svg(figure: Figure, prefix: str) -> str:
    svg = svg_with_colours(figure, ink="currentColor", grid="var(--grid)", dpi=160)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([^;\"]*?)'?sans-serif'?", r"font: \1inherit-sans", svg)
    # An image's id is a hash of its content, so equal images would share it. Nothing refers to it.
    svg = re.sub(r'\bid="image[0-9a-f]+"', "", svg)
    # Several figures share one page, in which every id must be unique.
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    return re.sub(r'href="#', f'href="#{prefix}-', svg)


def _band(
    axes: Axes, x: npt.ArrayLike, curves: Sequence[Sequence[float]], arm: str, **style: Any
) -> None:
    """Draw the mean over seeds and a band from the lowest to the highest seed."""
    values = np.asarray(curves, dtype=np.float64)
    colour, dash = _STYLES[arm]
    options: dict[str, Any] = {
        "linestyle": dash,
        "linewidth": 1.7,
        "label": ARM_TITLES[arm],
        **style,
    }
    axes.plot(x, values.mean(axis=0), color=colour, **options)
    if len(values) > 1:
        axes.fill_between(
            x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0
        )


def _history(comparison: Comparison, arm: str, key: str) -> list[list[float]]:
    """One curve per seed, cut to the shortest; empty if a run lacks the metric."""
    histories = [run.history for run in comparison.arm_runs(arm)]
    curves = [[row.get(key, math.nan) for row in history] for history in histories]
    length = min((len(curve) for curve in curves), default=0)
    curves = [curve[:length] for curve in curves]
    return curves if length and np.isfinite(curves).any() else []


def curves_figure(comparison: Comparison) -> str:
    """Loss terms, contrastive metrics, the ratio of the terms and effective rank by epoch."""
    panels = (
        ("JEPA loss", ("jepa_loss",)),
        ("Contrastive loss", ("contrastive_loss",)),
        ("Contrastive accuracy", ("contrastive_accuracy",)),
        ("Similarity of positives and negatives", ("contrastive_pos_sim", "contrastive_neg_sim")),
        ("Weighted contrastive / weighted JEPA", ("term_ratio",)),
        ("Effective rank of CLS", ("cls_effective_rank",)),
    )
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(10, 5.6), layout="constrained")
        for axes, (title, keys) in zip(figure.subplots(2, 3).flat, panels, strict=True):
            for arm in comparison.arms:
                # A baseline that trains one term alone has no ratio to show.
                if keys == ("term_ratio",) and arm != "cjepa":
                    continue
                for position, key in enumerate(keys):
                    curves = _history(comparison, arm, key)
                    if curves:
                        epochs = np.arange(1, len(curves[0]) + 1)
                        style: dict[str, Any] = (
                            {} if position == 0 else {"label": None, "linewidth": 1.0}
                        )
                        _band(axes, epochs, curves, arm, **style)
            if keys == ("term_ratio",):
                axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
            axes.set_title(title)
            axes.set_xlabel("epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        _shared_legend(figure, len(comparison.arms))
        return _svg(figure, "curves")


def _shared_legend(figure: Figure, columns: int) -> None:
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(str(label), handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        handlelength=3,
    )


def robustness_figure(comparison: Comparison) -> str:
    """Accuracy of the linear probe by kind and strength of corruption; empty if unmeasured."""
    rows = comparison.rows()
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(10, 5.4), layout="constrained")
        grid = figure.subplots(2, len(corruptions.KINDS), sharex=True, sharey=True)
        drawn = False
        for line, features in zip(grid, FEATURE_TITLES, strict=True):
            for axes, kind in zip(line, corruptions.KINDS, strict=True):
                keys = ["linear", *(f"linear_{kind}_{s}" for s in corruptions.STRENGTHS)]
                for row, evaluations in rows.items():
                    prefix = "pixels" if row == "pixels" else features
                    names = [f"{prefix}/{key}" for key in keys]
                    curves = [[e[n] for n in names] for e in evaluations if set(names) <= set(e)]
                    if curves:
                        drawn = True
                        _band(axes, range(len(keys)), curves, row, marker="o", markersize=3.5)
                axes.set_title(f"{kind}, {FEATURE_TITLES[features]}")
                axes.set_xticks(range(len(keys)), ["clean", "1", "2", "3"])
        for axes in grid[-1]:
            axes.set_xlabel("strength")
        for axes in grid[:, 0]:
            axes.set_ylabel("linear probe, %")
        if not drawn:
            return ""
        _shared_legend(figure, len(rows))
        return _svg(figure, "robustness")


def paired_figure(comparison: Comparison) -> str:
    """Every seed's few-label and k-NN accuracy, joined between the arms."""
    rows = [row for row in comparison.rows() if row != "pixels"]
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(10, 2.7), layout="constrained")
        panels = figure.subplots(1, len(HEADLINE_TITLES), sharey=True)
        for axes, (key, title) in zip(panels, HEADLINE_TITLES.items(), strict=True):
            features, metric = key.split("/")
            cells = [comparison.summary(row, features, metric) for row in rows]
            values = [cell.values if cell else () for cell in cells]
            if all(len(v) == len(comparison.seeds) for v in values):
                for seed in range(len(comparison.seeds)):
                    axes.plot(range(len(rows)), [v[seed] for v in values], color=GRID, zorder=1)
            for position, (row, points) in enumerate(zip(rows, values, strict=True)):
                axes.scatter(
                    [position] * len(points), points, color=_STYLES[row][0], s=22, zorder=2
                )
            pixels = comparison.summary("pixels", features, metric)
            if pixels:
                axes.axhline(pixels.mean, color=_STYLES["pixels"][0], linewidth=1, linestyle=":")
            axes.set_title(title)
            labels = [ARM_TITLES[row].split()[0].replace("Contrastive", "Contr.") for row in rows]
            axes.set_xticks(range(len(rows)), labels, rotation=20, ha="right")
            axes.set_xlim(-0.4, len(rows) - 0.6)
        figure.axes[0].set_ylabel("accuracy, %")
        return _svg(figure, "paired")


def project(features: Array) -> Array:
    """Project features to two dimensions with t-SNE and a fixed seed.

    Args:
        features: (n, D), fp32, n >= 4.

    Returns:
        (n, 2), fp32; all 0 if the features are all equal.

    Source:
        van der Maaten & Hinton, "Visualizing Data using t-SNE", JMLR 2008.
    """
    perplexity = min(30.0, (len(features) - 1) / 3)
    centred = features - features.mean(axis=0)
    scale = float(centred.std())
    if scale <= 1e-6 * float(np.abs(features).max()):
        # t-SNE divides by the spread of the features, which is zero for collapsed features.
        return np.zeros((len(features), 2), dtype=np.float32)
    with threadpool_limits(limits=1):
        tsne = TSNE(perplexity=perplexity, max_iter=500, init="pca", random_state=0, n_jobs=1)
        points: Array = tsne.fit_transform(centred / scale)
    return points


def projection_figure(
    features: Mapping[str, Mapping[str, Array]],
    labels: npt.NDArray[np.int64],
    class_names: Sequence[str],
) -> str:
    """2-D projections of test features, one column per encoder, one row per kind of features.

    Args:
        features: ``{row: {"mean": (N, D), "cls": (N, D)}}``.
        labels: (N,), the class of each image.
        class_names: Name of each class; the legend shows at most ten.
    """
    shown = np.arange(len(labels))
    if len(shown) > MAX_POINTS:
        shown = np.sort(np.random.RandomState(0).permutation(len(shown))[:MAX_POINTS])
    classes = np.unique(labels)
    with matplotlib.rc_context(_SETTINGS):
        columns = len(features)
        figure = Figure(figsize=(10, min(7.0, 20 / columns + 0.6)), layout="constrained")
        grid = figure.subplots(len(FEATURE_TITLES), columns, squeeze=False)
        for line, kind in zip(grid, FEATURE_TITLES, strict=True):
            line[0].set_ylabel(SHORT_FEATURE_TITLES[kind])
            for axes, by_kind in zip(line, features.values(), strict=True):
                points = project(by_kind[kind][shown])
                for position, label in enumerate(classes):
                    chosen = labels[shown] == label
                    axes.scatter(
                        *points[chosen].T,
                        s=11,
                        color=_CLASS_COLOURS[position % len(_CLASS_COLOURS)],
                        linewidths=0,
                        alpha=0.85,
                        label=class_names[label] if len(classes) <= 10 else None,
                        rasterized=True,
                    )
                axes.set_xticks([])
                axes.set_yticks([])
                axes.grid(visible=False)
                axes.spines[:].set_visible(True)
        for axes, row in zip(grid[0], features, strict=True):
            axes.set_title(ARM_TITLES[row])
        if len(classes) <= 10:
            handles, names = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside lower center", ncols=10, markerscale=2)
        return _svg(figure, "projection")
