"""Negatives from every rank of a process group.

nt_xent      the loss and its gradient           strategies   all-gather and ring
group        the ranks and their pairs           ring         the schedule of the ring
exchange     messages between ranks, counted     blocks       parts of S, by the operators
gather       rows of all ranks                   reference    the formula on all gathered pairs
whole_batch  losses of all rows on every rank    sup_con, info_nce   what their ranks exchange
info_nce_ring   keys that travel
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
