"""Negatives from every rank of a process group.

nt_xent      the loss and its gradient         strategies   all-gather and ring
group        who holds how many pairs          ring         who meets whom, and when
exchange     what ranks send each other        blocks       parts of S, by the operators
"""

from cjepa_kernels.definitions import STRATEGIES, Strategy
from cjepa_kernels.distributed.blocks import Options
from cjepa_kernels.distributed.exchange import Counts, counting
from cjepa_kernels.distributed.group import SharedGroup, resolve_group

__all__ = [
    "STRATEGIES",
    "Counts",
    "Options",
    "SharedGroup",
    "Strategy",
    "counting",
    "resolve_group",
]
