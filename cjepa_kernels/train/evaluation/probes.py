"""Probes of frozen features: linear, few-label and k-NN, also for transfer and robustness."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from cjepa_kernels.train.evaluation import corruptions
from cjepa_kernels.train.evaluation.collapse_measures import effective_rank, standard_deviation
from cjepa_kernels.train.evaluation.features import FeatureExtractor, Features

if TYPE_CHECKING:
    from cjepa_kernels.train.config import EvaluationConfig
    from cjepa_kernels.train.data.dataset import Dataset, LabeledImages

Array: TypeAlias = npt.NDArray[np.float32]
Labels: TypeAlias = npt.NDArray[np.int64]

# These seeds are constants and not the run's, so that every run and arm has the same labels.
_SUBSET_SEED = 0
_DRAW_SEED = 1
_MAX_ITER = 300
_QUICK_DRAWS = 3
_PIXEL_SIDE = 32


def few_label_draws(labels: Labels, per_class: int, draws: int) -> list[npt.NDArray[np.intp]]:
    """Indices of the labelled images of each draw, the same in every run.

    Args:
        labels: (N,), the class of each training image.
        per_class: Labelled images per class; a class with fewer gives all it has.
        draws: Number of draws.

    Returns:
        One index array per draw.
    """
    random = np.random.RandomState(_DRAW_SEED)
    per_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    return [
        np.concatenate([random.permutation(members)[:per_class] for members in per_label])
        for _ in range(draws)
    ]


def _percent(predicted: npt.NDArray[np.int64], labels: Labels) -> float:
    return 100.0 * float(np.mean(predicted == labels))


def _fit_linear(features: Array, labels: Labels, c: float) -> LogisticRegression:
    with warnings.catch_warnings():
        # The iteration limit is part of the probe's definition and the same for every encoder, so
        # a probe that reaches it is no cause for a warning.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=_MAX_ITER).fit(features, labels)


class _Probes:
    """The probes of one kind of features, fitted on (train, labels) and standardised by train."""

    def __init__(self, train: Array, labels: Labels, config: EvaluationConfig) -> None:
        self.labels = labels
        self.config = config
        self.mean = train.mean(axis=0)
        self.centred = train - self.mean
        self.scaler = StandardScaler().fit(train)
        self.standardised: Array = self.scaler.transform(train)

    def linear(self) -> Callable[[Array], npt.NDArray[np.int64]]:
        c = self.config.probe_l2
        if c is None:
            c = 1.0 if len(self.labels) <= 2000 else 0.1
        classifier = _fit_linear(self.standardised, self.labels, c)
        return lambda features: classifier.predict(self.scaler.transform(features))

    def few_label(self, test: Array, labels: Labels, draws: int) -> float:
        c = self.config.probe_l2 if self.config.probe_l2 is not None else 1.0
        scaled = self.scaler.transform(test)
        return float(
            np.mean(
                [
                    _percent(
                        _fit_linear(self.standardised[i], self.labels[i], c).predict(scaled), labels
                    )
                    for i in few_label_draws(self.labels, self.config.few_labels, draws)
                ]
            )
        )

    def knn(self, test: Array, labels: Labels) -> float:
        k = min(self.config.knn_k, len(self.labels))
        classifier = KNeighborsClassifier(k, metric="cosine", algorithm="brute", n_jobs=1)
        classifier.fit(self.centred, self.labels)
        return _percent(classifier.predict(test - self.mean), labels)


def _score(
    *,
    train: Array,
    train_labels: Labels,
    test: Array,
    test_labels: Labels,
    config: EvaluationConfig,
    corrupted: dict[str, Array],
    quick: bool,
) -> dict[str, float]:
    """Metrics of one kind of features, without the prefix."""
    probes = _Probes(train, train_labels, config)
    draws = min(config.few_label_draws, _QUICK_DRAWS) if quick else config.few_label_draws
    result = {
        "few_label": probes.few_label(test, test_labels, draws),
        "knn": probes.knn(test, test_labels),
    }
    if quick:
        return result
    linear = probes.linear()
    result["linear"] = _percent(linear(test), test_labels)
    if corrupted:
        scores = {f"linear_{k}": _percent(linear(v), test_labels) for k, v in corrupted.items()}
        result |= scores
        result["linear_robust"] = float(np.mean(list(scores.values())))
    return result


def _subset(split: LabeledImages, limit: int | None) -> tuple[Tensor, Labels]:
    images, labels = split.images, split.labels.numpy().astype(np.int64)
    if limit is None or len(labels) <= limit:
        return images, labels
    chosen = np.sort(np.random.RandomState(_SUBSET_SEED).permutation(len(labels))[:limit])
    return images[torch.from_numpy(chosen)], labels[chosen]


def _probe_labels(dataset: Dataset, config: EvaluationConfig) -> Labels:
    """The labels of the images on which the probes are fitted."""
    # The labels stand in for the images, which are large and not needed here.
    labels_alone = replace(dataset.train, images=dataset.train.labels)
    return _subset(labels_alone, config.max_train_images)[1]


def _features(extract: FeatureExtractor, images: Tensor) -> dict[str, Array]:
    features = Features(*extract(images))
    for name, tensor in (("CLS", features.cls), ("mean of patch", features.mean)):
        if tensor.ndim != 2 or len(tensor) != len(images):
            raise ValueError(
                f"extract must return {name} features of shape ({len(images)}, D), "
                f"got {tuple(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"extract returned {name} features that are not finite")
    return {
        "mean": features.mean.detach().float().cpu().numpy(),
        "cls": features.cls.detach().float().cpu().numpy(),
    }


def _pixels(images: Tensor) -> dict[str, Array]:
    pixels = images.float() / 255.0
    height, width = pixels.shape[-2:]
    if max(height, width) > _PIXEL_SIDE:
        size = [min(height, _PIXEL_SIDE), min(width, _PIXEL_SIDE)]
        pixels = F.interpolate(pixels, size=size, mode="area")
    return {"pixels": pixels.flatten(1).numpy()}


def check_dataset(dataset: Dataset, pretrain_classes: Sequence[int] | None = None) -> None:
    """Check that a dataset can be probed.

    Args:
        dataset: Images and labels.
        pretrain_classes: Classes that pretraining sees, if the others are to be probed.

    Raises:
        ValueError: If a split is empty or malformed, or too few classes are left.
    """
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        images, labels = split.images, split.labels
        if images.ndim != 4 or images.dtype != torch.uint8:
            raise ValueError(
                f"dataset.{name}.images must be uint8 of shape (N, C, H, W), "
                f"got {images.dtype} of shape {tuple(images.shape)}"
            )
        if len(images) == 0 or len(images) != len(labels):
            raise ValueError(
                f"dataset.{name} must hold one label per image and at least one image, "
                f"got {len(images)} images and {len(labels)} labels"
            )
    classes = set(dataset.train.labels.tolist())
    if len(classes) < 2:
        raise ValueError(f"the probes need at least 2 classes, dataset.train has {len(classes)}")
    if pretrain_classes is not None:
        other = classes - set(pretrain_classes)
        if len(other) < 2:
            raise ValueError(
                "pretrain_classes must leave at least 2 classes for the transfer probes, "
                f"got {sorted(pretrain_classes)} of {sorted(classes)}"
            )
        if not set(dataset.test.labels.tolist()) & other:
            raise ValueError(
                f"dataset.test must hold images of the transfer classes {sorted(other)}, got none"
            )


def check_probe_images(
    dataset: Dataset, config: EvaluationConfig, pretrain_classes: Sequence[int] | None = None
) -> None:
    """Check that the images which fit the probes are of at least two classes.

    Args:
        dataset: Images and labels.
        config: The evaluation section of the experiment.
        pretrain_classes: Classes that pretraining sees, if the others are to be probed.

    Raises:
        ValueError: If ``max_train_images`` keeps too few.
    """
    labels = _probe_labels(dataset, config)
    if len(set(labels.tolist()) - set(pretrain_classes or ())) < 2:
        raise ValueError(
            "evaluation.max_train_images must keep images of at least 2 probed classes, "
            f"got {config.max_train_images}"
        )


@dataclass(frozen=True)
class ProbeSizes:
    """How many images and labels the probes really have.

    Attributes:
        train_images: Images that the probes are fitted on.
        test_images: Images that the accuracies are of.
        fewest_labels: Labelled images of the class with fewest, in a draw of the few-label probe.
        most_labels: Those of the class with most.
        draws: Draws of the few-label probe.
        neighbours: Neighbours of the k-NN probe.
    """

    train_images: int
    test_images: int
    fewest_labels: int
    most_labels: int
    draws: int
    neighbours: int


def probe_sizes(
    dataset: Dataset, config: EvaluationConfig, pretrain_classes: Sequence[int] | None = None
) -> ProbeSizes:
    """The sizes of the probes of all classes, or of the classes left out of pretraining.

    Args:
        dataset: Images and labels.
        config: The evaluation section of the experiment.
        pretrain_classes: Classes that the transfer probes leave out. Default: all classes stay.
    """
    labels = _probe_labels(dataset, config)
    test_labels = dataset.test.labels.numpy()
    seen = [] if pretrain_classes is None else list(pretrain_classes)
    labels = labels[~np.isin(labels, seen)]
    test_labels = test_labels[~np.isin(test_labels, seen)]
    # A class counts even if none of its images is in the subset.
    classes = np.setdiff1d(np.unique(dataset.train.labels.numpy()), seen)
    counts = [min(config.few_labels, int((labels == label).sum())) for label in classes]
    return ProbeSizes(
        train_images=len(labels),
        test_images=len(test_labels),
        fewest_labels=min(counts, default=0),
        most_labels=max(counts, default=0),
        draws=config.few_label_draws,
        neighbours=min(config.knn_k, len(labels)),
    )


def _evaluate(
    extract: Callable[[Tensor], dict[str, Array]],
    dataset: Dataset,
    config: EvaluationConfig,
    *,
    quick: bool,
    pretrain_classes: Sequence[int] | None,
) -> dict[str, float]:
    check_dataset(dataset, pretrain_classes)
    check_probe_images(dataset, config, pretrain_classes)
    train_images, train_labels = _subset(dataset.train, config.max_train_images)
    test_labels = dataset.test.labels.numpy().astype(np.int64)
    seen = np.asarray([] if pretrain_classes is None else list(pretrain_classes), dtype=np.int64)
    train, test = extract(train_images), extract(dataset.test.images)
    corrupted: dict[str, dict[str, Array]] = {}
    if config.robustness and not quick:
        for kind in corruptions.KINDS:
            for strength in corruptions.STRENGTHS:
                changed = corruptions.corrupt(dataset.test.images, kind, strength)
                corrupted[f"{kind}_{strength}"] = extract(changed)
    result: dict[str, float] = {}
    # With one thread the numbers do not depend on the number of cores, and the problems are small.
    with threadpool_limits(limits=1, user_api="blas"):
        for name in train:
            scores = _score(
                train=train[name],
                train_labels=train_labels,
                test=test[name],
                test_labels=test_labels,
                config=config,
                corrupted={key: value[name] for key, value in corrupted.items()},
                quick=quick,
            )
            scores["std"] = standard_deviation(test[name])
            scores["effective_rank"] = effective_rank(test[name])
            if pretrain_classes is not None and not quick:
                rows, test_rows = ~np.isin(train_labels, seen), ~np.isin(test_labels, seen)
                transfer = _score(
                    train=train[name][rows],
                    train_labels=train_labels[rows],
                    test=test[name][test_rows],
                    test_labels=test_labels[test_rows],
                    config=config,
                    corrupted={},
                    quick=False,
                )
                scores |= {f"transfer_{key}": value for key, value in transfer.items()}
            result |= {f"{name}/{key}": value for key, value in scores.items()}
    return result


def evaluate(
    extract: FeatureExtractor,
    dataset: Dataset,
    config: EvaluationConfig,
    *,
    quick: bool = False,
    pretrain_classes: Sequence[int] | None = None,
) -> dict[str, float]:
    """Probe frozen features of the CLS token (``cls``) and of the mean of the patches (``mean``).

    Accuracies are in per cent of the test images. ``linear``: logistic regression on features
    standardised by the training set. ``few_label``: the same fitted on ``config.few_labels``
    labelled images per class, mean over ``config.few_label_draws`` fixed draws. ``knn``: majority
    among ``config.knn_k`` nearest training features, by cosine after the training mean is
    subtracted. ``std`` and ``effective_rank`` of the test features watch for collapse.
    ``linear_noise_1`` to ``linear_shift_3``: the linear probe, fitted on clean images, on corrupted
    test images (see :func:`corruptions.corrupt`); ``linear_robust`` is the mean of the nine.

    Args:
        extract: The frozen encoder.
        dataset: Images and labels; at most ``config.max_train_images`` of the training split, a
            fixed subset, fit the probes.
        config: The evaluation section of the experiment.
        quick: Only ``few_label`` (3 draws), ``knn``, ``std`` and ``effective_rank``.
        pretrain_classes: Classes that pretraining has seen; the probes ``transfer_*`` are fitted
            and tested on the other classes alone. Default: no transfer probes.

    Returns:
        ``{"mean/linear": 92.3, "cls/few_label": 87.7, ...}``.

    Raises:
        ValueError: If the dataset is empty or malformed, has fewer than two classes, or the
            features have the wrong shape or are not finite.
    """
    return _evaluate(
        lambda images: _features(extract, images),
        dataset,
        config,
        quick=quick,
        pretrain_classes=pretrain_classes,
    )


def evaluate_pixels(
    dataset: Dataset,
    config: EvaluationConfig,
    *,
    pretrain_classes: Sequence[int] | None = None,
) -> dict[str, float]:
    """Probe raw pixels the same way, as a baseline.

    Args:
        dataset: Images and labels. Images larger than 32 x 32 are averaged down to it.
        config: The evaluation section of the experiment.
        pretrain_classes: As in :func:`evaluate`, for the transfer probes.

    Returns:
        The metrics of :func:`evaluate` with keys ``pixels/linear``, ``pixels/knn``, ...

    Raises:
        ValueError: If the dataset is empty or malformed, or has fewer than two classes.
    """
    return _evaluate(_pixels, dataset, config, quick=False, pretrain_classes=pretrain_classes)
