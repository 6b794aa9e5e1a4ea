"""The training step and what surrounds it: callbacks, checkpoints, progress, parallel runs."""
