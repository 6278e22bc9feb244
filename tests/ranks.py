"""Real processes over gloo: spawned once per world size, kept for all tests, one thread each."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Of a whole call. Whatever hangs would hang until the timeout of the group, which is longer.
PATIENCE = 120.0


class Failure(AssertionError):
    """What went wrong on each rank."""


class Ranks:
    """``world_size`` processes in a process group.

    ``run(function, *arguments)`` calls a function of a test module on every rank and returns what
    each returned. After a failure the processes may be anywhere, and are replaced.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.processes: list[multiprocessing.Process] = []

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.directory = tempfile.TemporaryDirectory()
        store = str(Path(self.directory.name) / "store")
        pairs = [context.Pipe() for _ in range(self.world_size)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            context.Process(target=_serve, args=(rank, self.world_size, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pairs:
            theirs.close()

    def run(self, function: Callable, *arguments: Any, dying: tuple[int, ...] = ()) -> list[Any]:
        """The results of all ranks but those that are meant to die."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        results, failures = [], []
        deadline = time.monotonic() + PATIENCE
        for rank, pipe in enumerate(self.pipes):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError(f"no answer within {PATIENCE} s")
                succeeded, result = pickle.loads(pipe.recv_bytes())
            except (EOFError, OSError) as error:
                succeeded, result = rank in dying, f"died: {error!r}"
            if rank not in dying:
                results.append(result)
            if not succeeded:
                failures.append(f"rank {rank}: {result}")
                deadline = min(deadline, time.monotonic() + 5)  # the others may wait for this one
        if failures or dying:
            self.stop()
        if failures:
            raise Failure("\n".join(failures))
        return results

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes = []


def _serve(rank: int, world_size: int, store: str, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=2 * PATIENCE),
    )
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
