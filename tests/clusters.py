"""Real processes with Keras in them: alone on a chosen backend, or as the workers of a TensorFlow cluster.

TensorFlow takes seconds to import, so a nursery imports it once and forks a fresh process for every one asked for.
"""

import gc
import json
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

from .workers import free_port

_FAMILY = "AF_UNIX"


class Nursery:
    """A process with Keras imported on one backend, which forks others.

    Args:
        backend: of Keras.
    """

    def __init__(self, backend: str) -> None:
        self.address = tempfile.mktemp(prefix="signsgd-")
        self.listener = Listener(self.address, _FAMILY)
        context = multiprocessing.get_context("spawn")
        self.end, other = context.Pipe()
        os.environ["KERAS_BACKEND"], before = backend, os.environ.get("KERAS_BACKEND")
        try:
            self.process = context.Process(target=_nurse, args=(other, self.address))
            self.process.start()
        finally:
            if before is None:
                del os.environ["KERAS_BACKEND"]
            else:
                os.environ["KERAS_BACKEND"] = before
        other.close()

    def fork(self, environment: dict[str, str]) -> Connection:
        """Return the end of a fresh process that serves calls until it is closed."""
        self.end.send(environment)
        end = self.listener.accept()
        assert isinstance(end, Connection)
        return end

    def kill(self, pids: Collection[int]) -> None:
        """Kill those of the forked processes that still run; the nursery knows its own, whoever has their pids."""
        self.end.send(list(pids))

    def close(self) -> None:
        self.end.close()
        self.process.join(20)
        self.process.kill()
        self.process.join()
        self.listener.close()


class Cluster:
    """`size` processes that see each other through ``TF_CONFIG``; with one, a process alone.

    Attributes:
        failed: whether one did not do what it was asked for. TensorFlow's collectives stay aborted after an error.
    """

    def __init__(self, nursery: Nursery, size: int) -> None:
        workers = [f"127.0.0.1:{free_port()}" for _ in range(size)]
        self.nursery, self.ends = nursery, list[Connection]()
        for index in range(size):
            task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}
            self.ends.append(nursery.fork({"TF_CONFIG": json.dumps(task)} if size > 1 else {}))
        self.pids: list[int] = self.run(os.getpid)

    def run(
        self, function: Callable[..., Any], *args: Any, lost: tuple[int, ...] = (), timeout: float = 240.0
    ) -> list[Any]:
        """Return what `function(*args)` returned in each process; None for those that are expected to get `lost`."""
        self.failed = True
        for end in self.ends:
            end.send((function, args))
        results: list[Any] = [None] * len(self.ends)
        waiting: dict[Any, int] = {end: k for k, end in enumerate(self.ends) if k not in lost}
        deadline = time.monotonic() + timeout
        while waiting:
            ready: list[Any] = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(f"workers {sorted(waiting.values())} did not come back within {timeout} s")
            for end in ready:
                ok, result = end.recv()
                worker = waiting.pop(end)
                if not ok:
                    raise AssertionError(f"worker {worker} raised\n{result}")
                results[worker] = result
        self.failed = False
        return results

    def close(self) -> None:
        """End the processes: each leaves when its end is closed, or is killed."""
        for end in self.ends:
            end.close()
        self.nursery.kill(self.pids)


def _nurse(end: Connection, address: str) -> None:
    import signsgd_keras  # noqa: F401  what every child would import anyway

    gc.freeze()  # what was imported stays shared with the processes
    gc.disable()  # in them as well, but between calls: see devices.py
    context = multiprocessing.get_context("fork")
    while True:
        try:
            order = end.recv()
        except EOFError:
            break
        children = multiprocessing.active_children()  # without those that ended
        if isinstance(order, dict):
            context.Process(target=_serve, args=(address, order), daemon=True).start()
            continue
        for child in children:
            if child.pid in order:
                child.kill()


def _serve(address: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    end = Client(address, _FAMILY)
    while True:
        try:
            call = end.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        try:
            function, args = pickle.loads(call)  # imports the function's module, which may fail here
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        end.send(answer)
        gc.collect()  # here nothing is traced
