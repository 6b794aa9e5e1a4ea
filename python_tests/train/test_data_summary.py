"""Test the summary of the data that a run shows before it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("datasets")

from cjepa_kernels.train.config import config_from_dict
from cjepa_kernels.train.data.dataset import Dataset, LabeledImages
from cjepa_kernels.train.data.summary import DataSummary, summarize


def summary_of(height: int, width: int, **masking: Any) -> DataSummary:
    def part(labels: list[int]) -> LabeledImages:
        images = torch.zeros((len(labels), 3, height, width), dtype=torch.uint8)
        return LabeledImages(images, torch.tensor(labels))

    dataset = Dataset("tiny", part([0, 1, 1, 1]), part([1, 0, 0]), ("cat", "dog", "[bold]cow"))
    return summarize(config_from_dict({"masking": masking}), dataset)


def test_summary_counts_what_there_is() -> None:
    summary = summary_of(8, 6, visible=5, predicted=4)
    content = summary.to_dict()
    assert (content["train"], content["test"]) == (4, 3)
    assert content["classes"] == ["cat", "dog", "[bold]cow"]
    assert content["class_counts"] == {
        "train": {"cat": 1, "dog": 3, "[bold]cow": 0},
        "test": {"cat": 2, "dog": 1, "[bold]cow": 0},
    }
    assert content["image_size"] == {"width": 6, "height": 8, "channels": 3}
    assert content["patches"] == {"total": 12, "visible": 5, "predicted": 4}
    text = "\n".join(summary.lines())
    for part in ("4 training", "3 test", "3 classes", "dog (3 + 1)", "6 x 8", "12 patches: 5"):
        assert part in text
