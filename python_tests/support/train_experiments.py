"""Small experiments that the tests of the training program share."""

from __future__ import annotations

from pathlib import Path

import torch

from cjepa_kernels.train.config import ExperimentConfig, config_from_dict

TINY = {
    "data": {"source": "digits", "train_size": 128, "test_size": 60},
    "model": {
        "dim": 16,
        "depth": 2,
        "heads": 2,
        "predictor_dim": 8,
        "predictor_depth": 1,
        "predictor_heads": 2,
    },
    "trainer": {"epochs": 2, "batch_size": 32, "threads": 1},
    "evaluation": {"few_labels": 3, "few_label_draws": 2, "knn_k": 3, "robustness": False},
    "logging": {"tensorboard": False, "progress_bar": False},
}


def tiny(*overrides: str) -> ExperimentConfig:
    """An experiment that trains in a second."""
    return config_from_dict(TINY, overrides)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The weights in a run's last checkpoint."""
    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return state
