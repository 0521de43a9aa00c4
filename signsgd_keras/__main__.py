"""The demo: the same model trained with Adam, and by majority vote; what it costs, what it gives."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import keras

from signsgd_core import default_zeros, demo
from signsgd_core.network import traffic

from . import backend

LEARNING_RATES = {"Adam": 2e-3, "Signum": 4e-4, "verdict momentum": 2e-3, "SignMuon": 2e-2}
"""The best of a small grid on the digits."""

BY_FORMULA = (
    "since workers within one process share its memory and send nothing; --processes counts what real ones send"
)

WORKERS = 4
PARENT = "SIGNSGD_DEMO_PARENT"
"""Environment variable with the process that started a worker."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all methods, print the table, save the plot."""
    arguments = sys.argv[1:] if arguments is None else arguments
    program = "python -m signsgd_keras"
    about = "replicas in this process or, with --processes, processes"
    workers = f"{about} (default: {WORKERS} on the CPU, one per GPU where there are several)"
    parser = demo.parser(program, __doc__.splitlines()[0], workers, LEARNING_RATES)
    parser.add_argument("--processes", action="store_true", help="start the workers as processes, on the CPU")
    options = parser.parse_args(arguments)
    if not backend.current().can_vote:
        parser.error(f"needs Keras' TensorFlow backend, got {backend.current().name!r}: set KERAS_BACKEND=tensorflow")
    demo.settle(parser, options, default_workers(options.processes))
    try:  # before the workers start: they find a folder decoded, and what was skipped said
        demo.load(options.data, options.out, tell=PARENT not in os.environ)
    except ValueError as error:
        parser.error(str(error))
    if not options.processes:
        run(mirrored(options), options)
    elif "TF_CONFIG" not in os.environ:
        launch(options.workers, arguments)
    else:
        if PARENT in os.environ:
            leave_with(int(os.environ[PARENT]))
        from . import MultiWorkerMajorityVoteStrategy

        run(MultiWorkerMajorityVoteStrategy(adversaries=demo.adversaries(options)), options)


def run(strategy: Any, options: Any) -> None:
    """Train by all methods under one strategy and report."""
    from . import Signum
    from .demo import Adam, is_first, train

    data = demo.load(options.data, options.out, tell=False)
    workers, zeros = strategy.num_replicas_in_sync, options.zeros
    rule = zeros or default_zeros(workers)
    adam_lr, signum_lr, verdict_lr, signmuon_lr = options.lr
    (beta_1, beta_2), gamma = options.betas, options.verdict_momentum

    def cosine(lr: float, steps: int) -> Any:
        return keras.optimizers.schedules.CosineDecay(lr, steps)

    def adam(steps: int) -> Any:
        return Adam(cosine(adam_lr, steps), demo.adversaries(options))

    def signum(steps: int) -> Any:
        return Signum(cosine(signum_lr, steps), beta_1, beta_2, zeros=zeros)

    def verdict_momentum(steps: int) -> Any:
        return Signum(cosine(verdict_lr, steps), 0.0, 0.0, gamma, zeros=zeros)

    def signmuon(steps: int) -> Any:
        settings = {"orthogonalize": True, "exclude_layers": ["logits"], "other_lr_ratio": signum_lr / signmuon_lr}
        return Signum(cosine(signmuon_lr, steps), zeros=zeros, **settings)

    def averaged(parameters: int) -> int:
        return traffic.ring_all_reduce(parameters, workers, bits=32)

    def voted(parameters: int) -> int:
        return traffic.majority_vote(parameters, workers, rule)

    means, votes = (None, None) if options.processes else (averaged, voted)
    results = [
        train("Adam, averaged gradients", adam, means, strategy, data, options),
        train(f"Signum {options.betas}, vote", signum, votes, strategy, data, options),
        train(f"verdict momentum {gamma}, vote", verdict_momentum, votes, strategy, data, options),
        train("SignMuon, vote", signmuon, votes, strategy, data, options),
    ]
    if is_first(strategy):
        demo.report(results, options, "" if options.processes else BY_FORMULA)


def default_workers(processes: bool) -> int:
    """Return how many workers there are where nobody says: in a cluster that is already there, its own."""
    import tensorflow as tf

    if processes:
        cluster = json.loads(os.environ.get("TF_CONFIG", "{}")).get("cluster", {})
        return sum(map(len, cluster.values())) or WORKERS
    gpus = len(tf.config.list_physical_devices("GPU"))
    return gpus if gpus > 1 else WORKERS


def mirrored(options: Any) -> Any:
    """Return a strategy that votes among replicas of this process, on GPUs where there are enough."""
    import tensorflow as tf

    from . import MajorityVote

    workers = options.workers
    kind = "GPU" if workers <= len(tf.config.list_physical_devices("GPU")) else "CPU"
    if kind == "CPU":
        cpu, one = tf.config.list_physical_devices("CPU")[0], tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [one] * workers)
    devices = [f"{kind}:{k}" for k in range(workers)]
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=MajorityVote(adversaries=demo.adversaries(options)))


def launch(workers: int, arguments: Sequence[str]) -> None:
    """Run this program once for every worker, on this machine, to the end of all; none outlives this process.

    Args:
        workers: how many.
        arguments: of the command line.

    Raises:
        SystemExit: if one fails; the others are ended.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that `finally` is run
    addresses = free_addresses(workers)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for index in range(workers):
            task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            environment = {
                **os.environ,
                "TF_CONFIG": json.dumps(task),
                "CUDA_VISIBLE_DEVICES": "-1",  # workers that share a GPU's memory would send nothing
                PARENT: str(os.getpid()),
            }
            processes.append(subprocess.Popen([sys.executable, "-m", "signsgd_keras", *arguments], env=environment))
        codes: list[int | None] = [None]
        while None in codes:
            time.sleep(0.1)
            codes = [process.poll() for process in processes]
            for index, code in enumerate(codes):
                if code:
                    raise SystemExit(f"python -m signsgd_keras: worker {index} failed with exit status {code}")
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


def free_addresses(count: int) -> list[str]:
    """Return that many addresses of this machine that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return ["{}:{}".format(*one.getsockname()) for one in sockets]


def leave_with(parent: int) -> None:
    """End this process once its parent is gone, however it went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
