"""Real worker processes, started once and used by many tests; every task gets a fresh process group over Gloo."""

import contextlib
import gc
import multiprocessing
import os
import secrets
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOADED = [
    "signsgd_lightning.strategies.majority_vote",
    "signsgd_lightning.strategies.local_vote",
    "signsgd_lightning.monitor.geometry_monitor",
]
"""Imported once, so that a fresh worker starts at once."""


class Workers:
    """`size` processes; `run` lets the first few of them call a function as the ranks of one process group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._ends: list[Any] = []
        self.processes = []
        for _ in range(self.size):
            end, other = context.Pipe()
            process = context.Process(target=_serve, args=(other,), daemon=True)
            process.start()
            other.close()
            self._ends.append(end)
            self.processes.append(process)

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        lost: tuple[int, ...] = (),
        group_timeout: float = 30.0,
        timeout: float = 180.0,
        ranks_per_node: int | None = None,
    ) -> list[Any]:
        """Return what `function(*args)` returned on each rank; None for the ranks that are expected to get `lost`.

        All are on one node, or so many of them in turn on each. After a failure the processes are new ones.
        """
        try:
            return self._run(world_size, function, args, lost, group_timeout, timeout, ranks_per_node)
        except (AssertionError, TimeoutError, OSError, EOFError):
            if not lost:  # else the processes are the test's own, which looks at them
                self.close()
                self._start()
            raise

    def _run(
        self,
        world_size: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        lost: tuple[int, ...],
        group_timeout: float,
        timeout: float,
        ranks_per_node: int | None,
    ) -> list[Any]:
        port = free_port()
        for rank, end in enumerate(self._ends[:world_size]):
            end.send((rank, world_size, ranks_per_node, port, group_timeout, function, args))
        results: list[Any] = [None] * world_size
        waiting: dict[Any, int] = {end: rank for rank, end in enumerate(self._ends[:world_size]) if rank not in lost}
        deadline = time.monotonic() + timeout
        while waiting:
            ready: list[Any] = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"ranks {sorted(waiting.values())} did not come back within {timeout} s")
            for end in ready:
                ok, result = end.recv()
                rank = waiting.pop(end)
                if not ok:
                    raise AssertionError(f"rank {rank} raised\n{result}")
                results[rank] = result
        for end in self._ends[:world_size]:
            with contextlib.suppress(OSError):  # of a process that was killed
                end.send(None)
        return results

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


@contextlib.contextmanager
def fresh_workers(size: int) -> Iterator[Workers]:
    """Workers of one's own, for tests that kill some of them."""
    workers = Workers(size)
    try:
        yield workers
    finally:
        workers.close()


def free_port() -> int:
    """Return a port below those that outgoing connections get, so that none takes it before it is listened on."""
    while True:
        port = 10_000 + secrets.randbelow(22_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def _serve(end: Connection) -> None:
    import torch

    gc.freeze()  # what was imported is not looked through again and again, and stays shared with the other processes
    while True:
        try:
            rank, world_size, ranks_per_node, port, group_timeout, function, args = end.recv()
        except EOFError:
            return
        os.environ.update(environment(rank, world_size, port, ranks_per_node))
        try:
            torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=group_timeout))
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        end.send(answer)
        try:
            end.recv()  # all have answered: rank 0's store is not taken from others that still join a group
            torch.distributed.destroy_process_group()
            _forget_meshes()
        except Exception:
            traceback.print_exc()


def _forget_meshes() -> None:
    """Clear what DTensor has cached: a mesh of the next process group may equal one whose groups are gone."""
    from torch.distributed.tensor import DTensor, debug

    if hasattr(debug, "_clear_sharding_prop_cache"):
        debug._clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    else:  # torch 2.8
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()


def environment(rank: int, world_size: int, port: int, ranks_per_node: int | None = None) -> dict[str, str]:
    """Return the variables as torchrun sets them, so that a Lightning Trainer takes its place among the workers."""
    size = ranks_per_node or world_size
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % size),
        "GROUP_RANK": str(rank // size),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "GLOO_SOCKET_IFNAME": "lo",
    }
