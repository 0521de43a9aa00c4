"""What fails with Keras' own Lion and MultiWorkerMirroredStrategy and works with Signum: each line is really run.

python -m benchmarks.keras_peers
"""

import argparse
import os
import re
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.keras_cluster import Cluster, index, is_worker, tell, wait_for_go
from benchmarks.machine import machine

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

REPLICAS, WORKERS, PARAMETERS, STEPS, SECONDS = 2, 2, 1_000_000, 10, 600


def outcome(trial: Callable[[], str]) -> str:
    """Return what a trial says, or how it failed: the error's class and the beginning of its message."""
    try:
        return trial()
    except Exception as error:
        text = re.sub(r"\x1b\[\d+m", "", str(error))  # Keras writes in bold
        text = re.sub(r"\{.*\}", "{…}", text, flags=re.DOTALL)  # values in full
        return f"FAILS: {type(error).__name__}: {textwrap.shorten(text, 170, placeholder=' …')}"


def fit(strategy: Any, make: Callable[[], Any], epochs: int = 3) -> str:
    """Train a small model and say how the loss went and whether the replicas of this process are the same."""
    import keras

    keras.utils.set_random_seed(1)
    with strategy.scope():
        layers = [keras.layers.Dense(16, activation="relu"), keras.layers.BatchNormalization(), keras.layers.Dense(1)]
        model = keras.Sequential([keras.Input((8,)), *layers])
        model.compile(optimizer=make(), loss="mse", metrics=["mae"])
    x = np.random.default_rng(0).random((96, 8), np.float32)
    losses = model.fit(x, x.sum(axis=1, keepdims=True), batch_size=16, epochs=epochs, verbose=0).history["loss"]
    for variable in model.trainable_variables:
        copies = [copy.numpy() for copy in strategy.experimental_local_results(variable.value)]
        if not all(np.array_equal(copy, copies[0]) for copy in copies):
            return "FAILS: the replicas differ"
    if not np.isfinite(losses[-1]):
        return f"FAILS: the loss is {losses[-1]}"
    return f"works, loss {losses[0]:.2f} to {losses[-1]:.2f}"


def alone(make: Callable[[], Any]) -> str:
    import tensorflow as tf

    return fit(tf.distribute.get_strategy(), make)


def step_with_nan(strategy: Any, make: Callable[[], Any]) -> str:
    """Take a step in which one replica of two has a gradient of NaN."""
    import keras
    import tensorflow as tf

    with strategy.scope():
        variable, optimizer = keras.Variable(np.zeros(8, np.float32)), make()
        optimizer.build([variable])

    @tf.function  # type: ignore[untyped-decorator]
    def step() -> None:
        def run() -> None:
            first = tf.distribute.get_replica_context().replica_id_in_sync_group == 0
            optimizer.apply([tf.fill([8], tf.where(first, float("nan"), 1.0))], [variable])

        strategy.run(run)

    step()
    value = variable.numpy()
    return f"works, the variable is {value[0]:g}" if np.isfinite(value).all() else "FAILS: the variable is NaN"


def on_one_machine() -> list[tuple[str, str, str]]:
    """Rows of one process: what, theirs, ours."""
    import tensorflow as tf
    from keras.optimizers import Lion

    from signsgd_keras import MajorityVote, Signum

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * REPLICAS
    )
    devices = [f"CPU:{k}" for k in range(REPLICAS)]
    plain = tf.distribute.MirroredStrategy(devices)
    voting = tf.distribute.MirroredStrategy(devices, cross_device_ops=MajorityVote())
    accumulate = {"gradient_accumulation_steps": 2}
    average = {"use_ema": True, "ema_overwrite_frequency": 2}
    rows = [
        (
            "signSGD: beta_1=0",
            outcome(lambda: alone(lambda: Lion(1e-2, beta_1=0.0))),
            outcome(lambda: alone(lambda: Signum(1e-2, beta_1=0.0, beta_2=0.0))),
        )
    ]
    for what, settings in (
        ("", {}),
        (", gradient_accumulation_steps=2", accumulate),
        (", ema_overwrite_frequency=2", average),
    ):
        theirs = outcome(lambda s=settings: fit(plain, lambda: Lion(1e-2, **s)))  # type: ignore[misc]
        ours = outcome(lambda s=settings: fit(voting, lambda: Signum(1e-2, **s)))  # type: ignore[misc]
        rows.append((f"MirroredStrategy{what}", theirs, ours))
    rows.append(
        (
            "MirroredStrategy, NaN in one replica's gradient",
            outcome(lambda: step_with_nan(plain, lambda: Lion(1e-2))),
            outcome(lambda: step_with_nan(voting, lambda: Signum(1e-2))),
        )
    )
    return rows


def worker(ours: bool) -> None:
    """One of several processes: tell the outcome of `fit` with each optimizer, then bytes per step."""
    import tensorflow as tf
    from keras.optimizers import SGD, Lion

    from signsgd_keras import MultiWorkerMajorityVoteStrategy, Signum

    strategy = MultiWorkerMajorityVoteStrategy() if ours else tf.distribute.MultiWorkerMirroredStrategy()
    for make in (lambda: SGD(1e-2), lambda: Lion(1e-2), lambda: Signum(1e-2)):
        tell(outcome(lambda make=make: fit(strategy, make)))  # type: ignore[misc]
    tell(bytes_per_step(strategy, Signum(1e-3) if ours else Lion(1e-3)))
    wait_for_go()  # nobody leaves before all have been heard


def bytes_per_step(strategy: Any, optimizer: Any) -> float:
    """Return the payload that this worker sends a step, counted by the kernel at its TCP sockets."""
    import keras
    import tensorflow as tf

    from signsgd_core.network.traffic import sent_since, socket_bytes

    gradient = tf.constant(np.random.default_rng(index()).standard_normal(PARAMETERS, np.float32))
    with strategy.scope():
        variable = keras.Variable(np.zeros(PARAMETERS, np.float32))
        optimizer = type(optimizer).from_config(optimizer.get_config())
        optimizer.build([variable])

    @tf.function  # type: ignore[untyped-decorator]
    def step() -> None:
        strategy.run(lambda: optimizer.apply([gradient], [variable]))

    step()
    before = socket_bytes()
    for _ in range(STEPS):
        step()
    return sent_since(before) / STEPS


def on_several() -> list[tuple[str, str, str]]:
    """Rows of real worker processes: what, theirs, ours."""
    with Cluster(WORKERS, "benchmarks.keras_peers", "--worker", "theirs", seconds=SECONDS) as cluster:
        theirs = [cluster.hear()[0] for _ in range(3)]
        lion = sum(cluster.hear()) / WORKERS
    with Cluster(WORKERS, "benchmarks.keras_peers", "--worker", "ours", seconds=SECONDS) as cluster:
        ours = [cluster.hear()[0] for _ in range(3)]
        signum = sum(cluster.hear()) / WORKERS
    where = f"fit, {WORKERS} worker processes"
    return [
        (f"{where}, Keras' SGD", theirs[0], ours[0]),
        (f"{where}, Keras' Lion", theirs[1], ours[1]),
        (f"{where}, Signum", theirs[2], ours[2]),
        (
            f"bytes a worker sends per step, {PARAMETERS:,} parameters, own loop",
            f"{lion:,.0f} (Lion, fp32)",
            f"{signum:,.0f} (Signum, vote), {lion / signum:.1f} times fewer",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", choices=("theirs", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if is_worker() and options.worker:
        worker(options.worker == "ours")
        return
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("keras", "tensorflow-cpu"))
    print(f"{machine()}, {packages}")
    print("theirs: Keras' Lion, MirroredStrategy, MultiWorkerMirroredStrategy")
    print("ours:   Signum, MirroredStrategy(cross_device_ops=MajorityVote()), MultiWorkerMajorityVoteStrategy")
    for rows in (on_one_machine, on_several):
        for what, theirs, ours in rows():
            print(f"\n{what}\n  theirs: {theirs}\n  ours:   {ours}", flush=True)


if __name__ == "__main__":
    main()
