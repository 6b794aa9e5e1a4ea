"""The training program: ``runner`` trains one model, and ``compare`` trains and compares several.

data/        images and labels of any source, their views, masks and batches
model/       the vision transformer and the predictor
loop/        the training step, its callbacks, checkpoints and what a run leaves in its directory
evaluation/  probes of frozen features, and the outcome of a comparison
report/      the report of a comparison as one HTML page
"""
