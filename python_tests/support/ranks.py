"""Processes that are the ranks of a gloo group and run functions together."""

from __future__ import annotations

import io
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class RankError(RuntimeError):
    """A function failed on a rank. The message is the traceback of that rank."""


class Ranks:
    """``count`` processes that wait for work. They start once and serve any number of tests.

    Args:
        count: Number of ranks.
        timeout: Seconds after which an exchange without a partner fails.
    """

    def __init__(self, count: int, timeout: float = 60) -> None:
        self._directory = tempfile.TemporaryDirectory()
        # The ranks are forked from a process that has only imported the package, because each new
        # process would take seconds to import it.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "cjepa_kernels"])
        pairs = [context.Pipe() for _ in range(count)]
        self._ends: list[Connection] = [end for end, _ in pairs]
        self.processes = [
            context.Process(
                target=_serve, args=(rank, count, self._directory.name, timeout, end), daemon=True
            )
            for rank, (_, end) in enumerate(pairs)
        ]
        for process, (_, end) in zip(self.processes, pairs, strict=True):
            process.start()
            end.close()

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """Call ``function(*args, **options)`` on every rank and return the ranks' results.

        Raises:
            RankError: The function failed on a rank. All processes are ended, because the others
                may still wait for that rank.
        """
        results = self.attempt(function, *args, **options)
        errors = [result for result in results if isinstance(result, RankError)]
        if errors:
            self.close()
            raise errors[0]
        return results

    def attempt(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        """As :meth:`run`, but the result of a rank that failed or ended is a ``RankError``."""
        for end in self._ends:
            end.send((function, args, options))
        return [self._receive(end) for end in self._ends]

    @property
    def alive(self) -> bool:
        """Whether all processes are running."""
        return all(process.is_alive() for process in self.processes)

    def close(self) -> None:
        """End the processes, by force if they are stuck."""
        for end in self._ends:
            end.close()
        for process in self.processes:
            process.join(timeout=1)
            process.kill()
            process.join()
        self._directory.cleanup()

    @staticmethod
    def _receive(end: Connection) -> Any:
        try:
            content = end.recv_bytes()
        except EOFError:
            return RankError("the rank has ended")
        failed, result = torch.load(io.BytesIO(content), weights_only=False)
        return RankError(result) if failed else result


def _serve(rank: int, count: int, directory: str, timeout: float, end: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.path.join(directory, 'store')}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=timeout),
    )
    while True:
        try:
            function, args, options = end.recv()
        except EOFError:  # The other end is closed after the last test.
            dist.destroy_process_group()
            return
        torch.manual_seed(0)
        try:
            outcome = False, function(*args, **options)
        except Exception:
            outcome = True, traceback.format_exc()
        buffer = io.BytesIO()
        torch.save(outcome, buffer)
        end.send_bytes(buffer.getvalue())


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
