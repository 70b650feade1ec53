"""Processes that form a gloo process group and run functions on request, for tests of `natten.distributed`."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

#: After this a call that hangs fails: far more than any test takes.
TIMEOUT_SECONDS = 60


class WorkerPool:
    """`size` processes; `run(function, argument)` calls `function(argument)` in each, results by rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_work, args=(rank, size, store, theirs), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[[Any], Any], argument: Any = None) -> list[Any]:
        """Results by rank; exceptions come back as exceptions, in their place."""
        for pipe in self._pipes:
            pipe.send((function, argument))
        results = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(2 * TIMEOUT_SECONDS), f"rank {rank} hangs"
            results.append(pipe.recv())
        return results

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()


def _work(rank: int, size: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, argument = pipe.recv()
        except EOFError:
            break
        try:
            result = function(argument)
        except Exception as error:
            traceback.print_exc()
            result = error
        pipe.send(result)
    dist.destroy_process_group()
