"""Starts a script as the workers of a TensorFlow cluster and talks with them, for keras_wire and keras_peers.

The parent opens a `Cluster`; in each worker the script calls `is_worker`, `tell` and `wait_for_go`.
"""

import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any

_MARK = "@"  # before each line meant for the parent: whatever a library prints is none


class Cluster:
    """Processes `python -m MODULE ARGS…` that see each other through ``TF_CONFIG``; all end with the `with` block.

    Args:
        workers: how many.
        module: its name.
        arguments: of its command line.
        seconds: after which all are killed.
    """

    def __init__(self, workers: int, module: str, *arguments: str, seconds: float = 240.0) -> None:
        addresses, self.processes, self.errors = _free_addresses(workers), [], []
        self.watchdog = threading.Timer(seconds, self._kill)
        self.watchdog.daemon = True
        self.watchdog.start()
        for index in range(workers):
            task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment = {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow", "TF_CONFIG": json.dumps(task)}
            errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  closed with the cluster
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            self.processes.append(process)
            self.errors.append(errors)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *exception: object) -> None:
        self.watchdog.cancel()
        self._kill()
        for process, errors in zip(self.processes, self.errors, strict=True):
            process.wait()
            errors.close()

    def hear(self) -> list[Any]:
        """Return what each worker tells next.

        Raises:
            RuntimeError: if one ended without a word, with the end of what it printed.
        """
        return [self._hear(index) for index in range(len(self.processes))]

    def go(self) -> None:
        """Let every worker go on."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    def _hear(self, index: int) -> Any:
        stdout = self.processes[index].stdout
        assert stdout is not None
        for line in stdout:
            if line.startswith(_MARK):
                return json.loads(line[len(_MARK) :])
        self.errors[index].seek(0)
        raise RuntimeError(f"worker {index} ended:\n{self.errors[index].read()[-3000:]}")

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()


def is_worker() -> bool:
    """Tell whether a `Cluster` started this process; if so, from now on it ends when the parent is gone."""
    if "TF_CONFIG" not in os.environ:
        return False
    if not any(thread.name == "orders" for thread in threading.enumerate()):
        threading.Thread(target=_listen, name="orders", daemon=True).start()
    return True


def index() -> int:
    """Return the number of this worker."""
    return int(json.loads(os.environ["TF_CONFIG"])["task"]["index"])


def tell(value: Any) -> None:
    """Tell the parent something that JSON can say."""
    print(f"\n{_MARK}{json.dumps(value)}", flush=True)


def wait_for_go() -> None:
    """Wait for the parent's `go`; `is_worker` has been called before."""
    _ORDERS.get()


_ORDERS: "queue.Queue[str]" = queue.Queue()


def _listen() -> None:
    for line in sys.stdin:
        _ORDERS.put(line)
    os._exit(1)  # whatever it waits for


def _free_addresses(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    return addresses
