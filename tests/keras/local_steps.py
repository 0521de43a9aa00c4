"""One `fit` with `LocalVote` in a worker's process, recorded; and the judge, who replays all workers' rounds."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt

from signsgd_core import LocalReference

from .cluster_strategy import strategy
from .models import net, weights

Array = npt.NDArray[Any]
ROWS = 4
"""Of a batch."""


@dataclass(frozen=True)
class Case:
    """How all workers train.

    Attributes:
        optimizer: makes the inner one.
        every: batches of a round.
        make: builds the model.
        loss: as `compile` takes it.
        batches: each worker's, in every epoch.
        epochs: each worker's.
        vote: settings of `LocalVote`; a round is `every` optimizer steps where they do not say.
        validate: after each epoch, on worker 0's batches.
        compile: more of `compile`.
    """

    optimizer: Callable[[], Any]
    every: int
    batches: Sequence[int]
    make: Callable[[], Any] = net
    loss: Any = "mse"
    epochs: Sequence[int] = (2, 2, 2)
    vote: dict[str, Any] = field(default_factory=dict)
    validate: bool = False
    compile: dict[str, Any] = field(default_factory=dict)


class Run(NamedTuple):
    """What a worker saw of its variables.

    Attributes:
        start: trainable ones when training began.
        ends: the same before `LocalVote` was told of each batch, [epoch][batch].
        after: and after it was.
        told: trainable and other variables after `LocalVote` was told of anything else, in this order.
        logs: of each epoch.
    """

    start: list[Array]
    ends: list[list[list[Array]]]
    after: list[list[list[Array]]]
    told: list[tuple[str, list[Array], list[Array]]]
    logs: list[dict[str, float]]

    def measured(self) -> list[tuple[int, list[Array]]]:
        """Trainable variables when they were measured or saved at the end of an epoch, and its number."""
        found, epoch = [], 0
        for name, trained, _ in self.told[:-1]:
            found.append((epoch, trained))
            epoch += name == "epoch"
        return found


def values(variables: Sequence[Any]) -> list[Array]:
    return [np.array(v.numpy()) for v in variables]


class Recorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps a model's variables after each batch and whenever `LocalVote` was told of something."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[list[Array]]] = []
        self.told: list[tuple[str, list[Array], list[Array]]] = []
        self.logs: list[dict[str, float]] = []
        self.start: list[Array] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.start = self.start or values(self.model.trainable_variables)
        self.batches.append([])

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches[-1].append(values(self.model.trainable_variables))

    def _tell(self, name: str) -> None:
        self.told.append((name, values(self.model.trainable_variables), values(self.model.non_trainable_variables)))

    def on_test_begin(self, logs: Any = None) -> None:
        self._tell("test")

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._tell("epoch")
        self.logs.append({key: float(value) for key, value in (logs or {}).items()})

    def on_train_end(self, logs: Any = None) -> None:
        self._tell("end")


def rank() -> int:
    return int(strategy().cluster_resolver.task_id) if "TF_CONFIG" in os.environ else 0


def given(case: Case, worker: int) -> Any:
    """The batches of a worker: features in halves, targets in quarters."""
    import tensorflow as tf

    random = np.random.default_rng(worker)
    shape = (ROWS * case.batches[worker], 4)
    x, y = random.integers(-2, 3, shape) / 2, random.integers(-8, 9, (shape[0], 1)) / 4
    return tf.data.Dataset.from_tensor_slices((np.float32(x), np.float32(y))).batch(ROWS)


def fit_all(cases: Mapping[str, Case]) -> dict[str, Run]:
    return {name: fit(case) for name, case in cases.items()}


def fit(case: Case) -> Run:
    """Train, in a worker's process."""
    from signsgd_keras import LocalVote

    shared, worker = strategy() if "TF_CONFIG" in os.environ else None, rank()  # before the model
    model = case.make()
    for k, variable in enumerate(model.trainable_variables):
        variable.assign(weights(variable.shape, seed=k + 7 * worker))  # worker 0's are to win
    model.compile(case.optimizer(), case.loss, **{"jit_compile": False, **case.compile})
    before, after, vote = (
        Recorder(),
        Recorder(),
        LocalVote(**{"sync_every": case.every, "strategy": shared, **case.vote}),
    )
    options = {"epochs": case.epochs[worker], "verbose": 0, "callbacks": [before, vote, after]}
    model.fit(given(case, worker), validation_data=given(case, 0) if case.validate else None, **options)
    return Run(after.start, before.batches, after.batches, after.told, after.logs)


def rounds(run: Run, epoch: int, every: int) -> list[tuple[int, list[Array]]]:
    """Where a worker was at the end of each of its rounds of an epoch, and after how many batches."""
    batches = run.ends[epoch] if epoch < len(run.ends) else []
    numbers = [n for n in range(1, len(batches) + 1) if n % every == 0 or n == len(batches)]
    return [(n, batches[n - 1]) for n in numbers]


def judge(case: Case, runs: Sequence[Run]) -> LocalReference:
    """Replay the rounds and demand the reference's parameters of every worker, after each round and at the end."""
    every, names = case.every, ("outer_lr", "outer_momentum", "adversaries")
    options = {name: case.vote[name] for name in names if name in case.vote}
    reference = LocalReference(runs[0].start, len(runs), **options)
    demand(runs[0].start, *(run.start for run in runs))
    for epoch in range(max(len(run.ends) for run in runs)):
        own = [rounds(run, epoch, every) for run in runs]
        for r in range(max(map(len, own))):
            stay = [x.copy() for x in reference.parameters]
            reference.close([mine[r][1] if r < len(mine) else stay for mine in own])
            for run, mine in zip(runs, own, strict=True):
                if r < len(mine) and mine[r][0] % every == 0:
                    demand(reference.parameters, run.after[epoch][mine[r][0] - 1])
        for run in runs:
            if epoch < len(run.ends):
                demand(reference.parameters, *(trained for e, trained in run.measured() if e == epoch))
    for run in runs:
        demand(reference.parameters, run.told[-1][1])
    return reference


def demand(ours: Sequence[Array], *theirs: Sequence[Array]) -> None:
    """Bit for bit."""
    for other in theirs:
        for a, b in zip(ours, other, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)
