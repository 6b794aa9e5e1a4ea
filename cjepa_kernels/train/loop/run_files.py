"""The names of the files that a run leaves in its directory."""

from __future__ import annotations

from pathlib import Path

RESULT = "result.json"
LAST_CHECKPOINT = Path("checkpoints") / "last.ckpt"
PREVIOUS_CHECKPOINT = Path("checkpoints") / "previous.ckpt"
