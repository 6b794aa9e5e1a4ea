"""Negatives from every rank of a process group.

group      who holds how many pairs        exchange   what ranks send each other
ring       who meets whom, and when        nt_xent    the loss, from the operators of single blocks
"""

from cjepa_kernels.distributed.exchange import Counts, counting
from cjepa_kernels.distributed.group import resolve_group
from cjepa_kernels.distributed.nt_xent import STRATEGIES, Strategy

__all__ = ["STRATEGIES", "Counts", "Strategy", "counting", "resolve_group"]
