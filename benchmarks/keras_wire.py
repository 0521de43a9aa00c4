"""Bytes that real worker processes send per step: Signum's vote beside Keras' SGD and its fp32 reduction.

python -m benchmarks.keras_wire

The workers run in a network namespace of their own, in which nothing else sends, and the bytes are those that its
interface counted: headers, acknowledgements and TensorFlow's heartbeats included. It takes root, or a system that
lets users make namespaces; elsewhere only the payload is counted, by the kernel at the workers' TCP sockets.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.keras_cluster import Cluster, index, is_worker, tell, wait_for_go
from benchmarks.machine import machine
from signsgd_core.network.traffic import majority_vote, ring_all_reduce, sent_since, socket_bytes

TENSORS, WARMUP = 10, 3
METHODS = {"fp32": "SGD, fp32 reduction", "vote": "Signum, vote"}
INSIDE = "SIGNSGD_OWN_NETWORK"


def worker(method: str, parameters: int, steps: int) -> None:
    """Take steps with gradients that do not change: no data, no metrics, so that nothing else travels."""
    import keras
    import tensorflow as tf

    from signsgd_keras import MultiWorkerMajorityVoteStrategy, Signum

    vote = method == "vote"
    strategy = MultiWorkerMajorityVoteStrategy() if vote else tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        variables = [keras.Variable(np.zeros(parameters // TENSORS, np.float32)) for _ in range(TENSORS)]
        optimizer = Signum(1e-3) if vote else keras.optimizers.SGD(1e-3)
        optimizer.build(variables)
    draw = np.random.default_rng(index())
    gradients = [tf.constant(draw.standard_normal(parameters // TENSORS, np.float32)) for _ in range(TENSORS)]

    @tf.function  # type: ignore[untyped-decorator]
    def step() -> None:
        strategy.run(lambda: optimizer.apply(gradients, variables))

    for _ in range(WARMUP):
        step()
    tell("ready")
    wait_for_go()
    before, seconds = socket_bytes(), []
    for _ in range(steps):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    tell((sent_since(before) / steps, median(seconds), float(np.abs(variables[0].numpy()).sum())))
    wait_for_go()


def measure(workers: int, method: str, parameters: int, steps: int) -> tuple[float, float, float]:
    """Return payload and interface bytes per worker and step, and the median time of a step."""
    arguments = ["--worker", method, "--parameters", str(parameters), "--steps", str(steps)]
    with Cluster(workers, "benchmarks.keras_wire", *arguments) as cluster:
        cluster.hear()
        before = interface_bytes()
        cluster.go()
        results = cluster.hear()  # all have finished their last step
        sent = interface_bytes() - before
    if len({total for _, _, total in results}) != 1:
        raise RuntimeError(f"the workers' parameters differ: {results}")
    payload = sum(result[0] for result in results) / workers
    return payload, sent / workers / steps, max(result[1] for result in results)


def interface_bytes() -> int:
    """Return what the loopback interface of this network namespace has sent so far."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[8])
    raise RuntimeError("this network namespace has no interface lo")


def enter_namespace() -> bool:
    """Start this program again in a network namespace of its own; it is gone when its last process is.

    Returns:
        False where that is not possible; where it is, this does not return.
    """
    own = ["unshare", "--net", "--map-root-user"]
    up = "ip link set lo up"
    possible = subprocess.run([*own, "sh", "-c", up], capture_output=True).returncode == 0
    if possible:
        os.environ[INSIDE] = "1"
        again = ["sh", "-c", f'{up} && exec "$@"', "sh", sys.executable, "-m", "benchmarks.keras_wire", *sys.argv[1:]]
        os.execvp(own[0], [*own, *again])
    return False


def print_rows(workers: int, parameters: int, steps: int, inside: bool) -> None:
    formulas = {
        "fp32": ring_all_reduce(parameters, workers, bits=32),
        "vote": majority_vote(parameters, workers),
    }
    results: dict[str, Any] = {m: measure(workers, m, parameters, steps) for m in METHODS}
    first = results["fp32"]
    for method, (payload, sent, seconds) in results.items():
        wire = f"{sent:>13,.0f}{sent / formulas[method]:>9.3f}{first[1] / sent:>7.1f}x" if inside else ""
        print(
            f"{workers:>7}{parameters:>12,}  {METHODS[method]:<21}{formulas[method]:>12,}{payload:>13,.0f}"
            f"{first[0] / payload:>7.1f}x{wire}{seconds * 1e3:>9.1f} ms{seconds / first[2]:>6.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--parameters", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if is_worker() and options.worker:
        worker(options.worker, options.parameters[0], options.steps)
        return
    inside = os.environ.get(INSIDE) == "1" or enter_namespace()
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("keras", "tensorflow-cpu"))
    print(f"{machine()}, {packages}, {options.steps} steps")
    if inside:
        print(
            "interface: lo of a network namespace of the workers' own; its packets hold up to 64 KiB behind one header"
        )
        columns = f"{'interface':>13}{'/formula':>9}{'fewer':>8}"
    else:
        print("no network namespace can be made here (no root): the interface is not counted, only TCP payload")
        columns = ""
    print("bytes that one worker sends per step, the mean of all; time: median step of the slowest worker, and ratio")
    print(f"{'workers':>7}{'parameters':>12}  {'':<21}{'formula':>12}{'payload':>13}{'fewer':>8}{columns}{'time':>12}")
    for workers in options.workers:
        for parameters in options.parameters:
            print_rows(workers, parameters, options.steps, inside)


if __name__ == "__main__":
    main()
