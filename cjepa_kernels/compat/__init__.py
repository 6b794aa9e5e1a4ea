"""Losses with the names, arguments and results of other projects, computed by this package.

Each module stands for one project. Its classes have the constructor, the defaults, the forward and
the type of result of that project's classes, so that a program changes one import line. What they
do not cover is a ``ValueError`` that names the argument. None of the projects needs to be
installed.
"""

from cjepa_kernels.compat import (
    info_nce,
    lightly,
    open_clip,
    pytorch_metric_learning,
    sentence_transformers,
)

__all__ = [
    "info_nce",
    "lightly",
    "open_clip",
    "pytorch_metric_learning",
    "sentence_transformers",
]
