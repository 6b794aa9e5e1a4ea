"""The training step, its callbacks and checkpoints, and the processes of a comparison."""
