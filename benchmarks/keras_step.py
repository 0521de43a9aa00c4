"""Time of one step of Signum, without a vote and of all of a voted step but the exchange, beside Keras' Lion.

python -m benchmarks.keras_step
"""

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.machine import machine

MODES = (("tensorflow", "tf.function"), ("tensorflow", "XLA"), ("jax", "jit, donated"), ("torch", "eager"))
SIDE, TENSORS, LIONS, WARMUP = 1000, 10, 3, 4
ALONE, VOTED, TALLY = 1.05, 1.15, 0.30
"""The targets, in steps of Lion."""

Step = Callable[[], Any]


def measure(backend: str, mode: str, rounds: int) -> None:
    """Print the table of one backend, in a process of its own."""
    import keras

    gradients = [keras.ops.convert_to_tensor(g) for g in arrays(1)]
    steps = {name: compiled(make(), gradients, backend, mode) for name, make in optimizers().items()}
    targets = {name: ALONE if name.startswith("Signum") else None for name in steps}
    if (backend, mode) == MODES[0]:
        for name, betas in (
            ("(.9, .9)", (0.9, 0.9)),
            ("(.9, .99)", (0.9, 0.99)),
            ("(0, 0) verdict momentum .8", (0, 0)),
        ):
            settings = {"beta_1": betas[0], "beta_2": betas[1], "verdict_momentum": 0.0 if betas[1] else 0.8}
            steps[f"voted step, no exchange, {name}"] = voted(gradients, settings)
            targets[f"voted step, no exchange, {name}"] = VOTED
        steps["tally of 4 ballots of 10 M"] = tally(4)
        targets["tally of 4 ballots of 10 M"] = TALLY
    times = interleaved(steps, rounds)
    lions = np.concatenate([times[name] for name in times if name.startswith("Lion #")])
    places = " ".join(f"{np.median(times[f'Lion #{k}'][:, 0]) / np.median(lions[:, 0]):.2f}" for k in range(LIONS))
    print(f"\n{backend}, {mode}: Lion {np.median(lions[:, 0]) * 1e3:.1f} ms, its {LIONS} copies {places} of that")
    for name, target in targets.items():
        if name.startswith("Lion #"):
            continue
        base = times["Lion, decay .1"] if name.endswith("Lion, decay .1") and "Signum" in name else lions
        wall, busy = np.median(times[name], axis=0) / np.median(base, axis=0)
        told = "" if target is None else f"{target:>8.2f}  {'reached' if wall <= target else 'NOT reached'}"
        print(f"  {name:<52}{np.median(times[name][:, 0]) * 1e3:>7.1f} ms{wall:>7.2f}{busy:>7.2f}{told}")


def optimizers() -> dict[str, Callable[[], Any]]:
    from keras.optimizers import Adam, Lion

    from signsgd_keras import Signum

    return {
        **{f"Lion #{k}": lambda: Lion(1e-3) for k in range(LIONS)},  # its own time varies with what ran before
        "Lion, decay .1": lambda: Lion(1e-3, weight_decay=0.1),
        "Adam": lambda: Adam(1e-3),
        "Signum (.9, .9)": lambda: Signum(1e-3),
        "Signum (.9, .9), decay .1 / Lion, decay .1": lambda: Signum(1e-3, weight_decay=0.1),
        "Signum (.9, .99), which is Lion": lambda: Signum(1e-3, beta_2=0.99),
        "Signum (.9, .99), decay .1 / Lion, decay .1": lambda: Signum(1e-3, beta_2=0.99, weight_decay=0.1),
        "Signum (0, 0), which is signSGD": lambda: Signum(1e-3, beta_1=0.0, beta_2=0.0),
        "Signum (0, 0), verdict momentum .8": lambda: Signum(1e-3, beta_1=0.0, beta_2=0.0, verdict_momentum=0.8),
    }


def compiled(optimizer: Any, gradients: list[Any], backend: str, mode: str) -> Step:
    """Return one step of an optimizer over variables of its own, as the backend runs it."""
    import keras

    variables = [keras.Variable(x) for x in arrays(0)]
    optimizer.build(variables)
    if backend == "tensorflow":
        import tensorflow as tf

        step = tf.function(lambda grads: optimizer.apply(grads, variables), jit_compile=mode == "XLA")
        return lambda: step(gradients)
    if backend == "torch":
        import torch

        wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        return lambda: (optimizer.apply(gradients, variables), wait())  # type: ignore[no-untyped-call]
    import jax

    def stateless(x: Any, state: Any, grads: Any) -> Any:
        return optimizer.stateless_apply(state, grads, x)

    held = [[v.value for v in variables], [v.value for v in optimizer.variables]]
    jitted = jax.jit(stateless, donate_argnums=(0, 1))

    def run() -> None:
        held[:] = jitted(*held, gradients)
        jax.block_until_ready(held)  # type: ignore[no-untyped-call]

    return run


def voted(gradients: list[Any], settings: dict[str, Any]) -> Step:
    """Return one step of a replica as `Vote` takes it, without an exchange: its ballot comes back as the verdict."""
    import keras
    import tensorflow as tf

    from signsgd_keras import Signum

    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        variables = [keras.Variable(x) for x in arrays(0)]
        optimizer = Signum(1e-3, zeros="alternate", **settings)
        optimizer.workers.count = 2  # so that its momentum is this replica's own
        optimizer.build(variables)
        optimizer.vote._exchange = lambda given, ballots: (list(ballots), [])

    @tf.function  # type: ignore[untyped-decorator]
    def step(grads: Any) -> None:
        optimizer._step_together([grads], list(range(len(variables))))
        optimizer.iterations.assign_add(1)

    def run() -> None:
        with strategy.scope():
            step(gradients)

    return run


def tally(replicas: int) -> Step:
    """Return the count of all coordinates; where the workers are other machines, each counts one shard of them."""
    import tensorflow as tf

    from signsgd_keras.vote.ballots import count_words, verdict

    random = np.random.default_rng(2)
    size = (1, SIDE * SIDE * TENSORS // 8)
    ballots = [tf.constant(random.integers(0, 256, size, np.uint8)) for _ in range(replicas)]
    step = tf.function(lambda cast, parity: verdict(count_words(cast), "alternate", parity))
    return lambda: step(ballots, tf.constant(1, tf.uint8))


def interleaved(steps: dict[str, Step], rounds: int) -> dict[str, Any]:
    """Return wall and processor seconds of each step, (rounds, 2); once a round, in an order drawn anew each round."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)
    for _ in range(WARMUP + rounds):
        draw.shuffle(order)
        for name in order:
            begin, busy = time.perf_counter(), time.process_time()
            steps[name]()
            times[name].append((time.perf_counter() - begin, time.process_time() - busy))
    return {name: np.array(pairs[WARMUP:]) for name, pairs in times.items()}


def arrays(seed: int) -> list[Any]:
    draw = np.random.default_rng(seed)
    return [draw.standard_normal((SIDE, SIDE), np.float32) for _ in range(TENSORS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--mode", type=int, choices=range(len(MODES)), help="only this one, in this process")
    options = parser.parse_args()
    if options.mode is not None:
        measure(*MODES[options.mode], options.rounds)
        return
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("keras", "tensorflow-cpu", "jax", "torch"))
    print(f"{machine()}, {packages}")
    print(f"{SIDE * SIDE * TENSORS:,} parameters in {TENSORS} tensors, medians of {options.rounds} interleaved rounds")
    print("columns: wall time; in steps of Keras' Lion, wall and processor time; the target, of wall time")
    for number, (backend, _) in enumerate(MODES):
        environment = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [
            sys.executable,
            "-m",
            "benchmarks.keras_step",
            "--mode",
            str(number),
            "--rounds",
            str(options.rounds),
        ]
        subprocess.run(command, env={**os.environ, **environment}, check=True, timeout=600)


if __name__ == "__main__":
    main()
