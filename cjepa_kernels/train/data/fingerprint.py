"""A fingerprint of the images and labels of a run, by which it notices that they have changed."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from cjepa_kernels.train.data.dataset import Dataset

_LOG = logging.getLogger(__name__)


def fingerprint(dataset: Dataset) -> str:
    """Hash the images, the labels and their division into training and test images.

    The string is the same for the same data in the same order, on every machine.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in (dataset.train, dataset.test):
        for values in (part.images, part.labels):
            digest.update(f"{values.dtype} {tuple(values.shape)} ".encode())
            digest.update(values.contiguous().numpy().data)
    return f"blake2b:{digest.hexdigest()}"


def check_fingerprint(stored: Any, current: str, *, origin: str, remedy: str) -> None:
    """Refuse to go on with data that differ from those of before.

    Args:
        stored: The recorded fingerprint, or None if an earlier version wrote the file.
        current: The fingerprint of the data as they are now.
        origin: The file with the record, for the message.
        remedy: The advice of the message.

    Raises:
        ValueError: If the two differ.
    """
    if stored is None:
        _LOG.warning(
            "note: %s was written by an earlier version, which did not record its data; whether "
            "they have changed since is not known",
            origin,
        )
    elif stored != current:
        raise ValueError(
            "data: the images, labels or their division into training and test images have changed "
            f"since {origin} was written (fingerprint {stored} there, {current} now): bring the "
            f"former data back, or {remedy}"
        )
