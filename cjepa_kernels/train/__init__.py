"""The training program: ``runner`` trains one model, and ``compare`` trains and compares several.

The rooms stand in the order of their imports, and a room imports only from those above it:

config.py    the configuration of an experiment
model/       the vision transformer and the predictor
data/        images and labels of any source, their views, masks and batches
evaluation/  probes of frozen features, measures of collapse, and the outcome of a comparison
loop/        the training step, the collapse monitor and the other callbacks, the checkpoints, and
             the files that a run leaves in its directory
report/      the report of a comparison as one HTML page
runner.py    one training run
compare.py   several runs, compared
"""
