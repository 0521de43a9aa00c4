"""The one list of front ends. Adding one is adding an entry: how it runs cases, and why it leaves out which."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from signsgd_core.wire import BUCKET_SIZE
from tests.clusters import Cluster
from tests.devices import mirrored
from tests.workers import Workers

from . import core_runs, keras_runs, lightning_runs, torch_runs
from .cases import SHAPES, Case, Trajectory, cases, covering


@dataclass(frozen=True)
class Processes:
    """Where front ends run: fixtures of `tests/conftest.py`."""

    workers: Workers
    backend: Callable[[str], Cluster]
    cluster: Callable[[int], Cluster]


Run = Callable[[Sequence[Case], Processes], list[list[Trajectory]]]
"""Takes cases of one number of workers; returns what every worker had after each step, [worker][case]."""


@dataclass(frozen=True)
class FrontEnd:
    """A way to train.

    Attributes:
        name: of it.
        run: runs cases.
        covers: the public names that step or vote in it, and `"backend:NAME"` for a backend of Keras.
        skips: why a case is left out; None where it runs.
        without: tensors that it has not, by their numbers in `cases.SHAPES`, and why.
    """

    name: str
    run: Run
    covers: tuple[str, ...]
    skips: Callable[[Case], str | None] = lambda case: None
    without: Mapping[int, str] = field(default_factory=dict, hash=False)

    @cached_property
    def cases(self) -> list[Case]:
        """Those that it runs: of all that it does not skip, so many that every pair of options is among them."""
        return covering(tuple(case for case in cases() if self.skips(case) is None))


def one_worker_only(case: Case) -> str | None:
    return "it is one worker alone" if case.workers > 1 else None


def two_or_more(case: Case) -> str | None:
    return "one rank exchanges nothing: torch-gloo runs it" if case.workers == 1 else None


def same_gradients_on_all(case: Case) -> str | None:
    if case.absent == "somewhere":
        return "replicas that lack different gradients are refused, see test_refusals.py"
    return None


def graph_of_replicas(case: Case) -> str | None:
    refused = same_gradients_on_all(case)
    if refused is None and case.workers > 2 and case not in (Case(3), Case(8)):
        return "a graph of many replicas takes seconds to trace; keras-mirrored-eager runs it, and this runs it with 2"
    return refused


def cluster_of_workers(case: Case) -> str | None:
    refused = same_gradients_on_all(case)
    if refused is None and case.workers > 4:
        return "so many TensorFlow processes take long on two cores; 2, 3 and 4 run, and keras-mirrored-eager runs all"
    if refused is None and case.workers > 2 and case.betas != (0.5, 0.5) and not case.absent:
        return "betas and verdict momentum are a worker's own affair, and this runs them with 2"
    return refused


def exact_in_bfloat16(case: Case) -> str | None:
    if case.betas[1] == 0.25:
        return "five steps of a quarter need more bits than the 8 of a bfloat16 momentum"
    return None


def _gloo(
    bucket_size: int = 256,
    kernel: str | None = None,
    momentum_dtype: torch.dtype | None = None,
    overlap: bool = False,
) -> Run:
    """Blocks are small, so that a vector takes several."""
    settings = bucket_size, kernel, momentum_dtype, overlap
    return lambda cases, on: on.workers.run(cases[0].workers, torch_runs.vote, cases, *settings)


def _keras(backend: str, compiled: bool = False) -> Run:
    return lambda cases, on: on.backend(backend).run(keras_runs.alone, cases, compiled)


def _mirrored(graph: bool) -> Run:
    return lambda cases, on: keras_runs.under(mirrored(cases[0].workers), cases, graph)


_EMPTY = {SHAPES.index((0,)): "TensorFlow's own strategy for several workers dies of a variable without elements"}


def _multi_worker(cases: Sequence[Case], on: Processes) -> list[list[Trajectory]]:
    return on.cluster(cases[0].workers).run(keras_runs.multi_worker, cases, tuple(_EMPTY))


_SIGNUM, _VOTE = "signsgd_lightning.Signum", "signsgd_lightning.enable_majority_vote"
_KERAS_SIGNUM, _KERAS_VOTE = "signsgd_keras.Signum", "signsgd_keras.MajorityVote"

FRONT_ENDS: tuple[FrontEnd, ...] = (
    FrontEnd("core-packed", lambda cases, on: [core_runs.packed(cases)], ()),
    FrontEnd("torch-alone", lambda cases, on: [torch_runs.alone(cases)], (_SIGNUM,), one_worker_only),
    FrontEnd("torch-gloo", _gloo(), (_SIGNUM, _VOTE)),
    FrontEnd("torch-gloo-one-bucket", _gloo(BUCKET_SIZE), (_SIGNUM, _VOTE), two_or_more),
    FrontEnd("torch-gloo-device-kernel", _gloo(kernel="DeviceKernel"), (_SIGNUM, _VOTE), two_or_more),
    FrontEnd("torch-gloo-numpy-kernel", _gloo(kernel="NumpyKernel"), (_SIGNUM, _VOTE), two_or_more),
    FrontEnd("torch-gloo-overlap", _gloo(overlap=True), (_SIGNUM, _VOTE), two_or_more),
    FrontEnd("torch-gloo-bf16-momentum", _gloo(momentum_dtype=torch.bfloat16), (_SIGNUM, _VOTE), exact_in_bfloat16),
    FrontEnd(
        "lightning-gloo",
        lambda cases, on: on.workers.run(cases[0].workers, lightning_runs.fit, cases),
        (_SIGNUM, "signsgd_lightning.MajorityVoteStrategy"),
    ),
    FrontEnd("keras-tensorflow", _keras("tensorflow"), (_KERAS_SIGNUM, "backend:tensorflow"), one_worker_only),
    FrontEnd(
        "keras-tensorflow-xla", _keras("tensorflow", True), (_KERAS_SIGNUM, "backend:tensorflow"), one_worker_only
    ),
    FrontEnd("keras-jax", _keras("jax"), (_KERAS_SIGNUM, "backend:jax"), one_worker_only),
    FrontEnd("keras-torch", _keras("torch"), (_KERAS_SIGNUM, "backend:torch"), one_worker_only),
    FrontEnd("keras-mirrored", _mirrored(graph=True), (_KERAS_SIGNUM, _KERAS_VOTE), graph_of_replicas),
    FrontEnd("keras-mirrored-eager", _mirrored(graph=False), (_KERAS_SIGNUM, _KERAS_VOTE), same_gradients_on_all),
    FrontEnd(
        "keras-multi-worker",
        _multi_worker,
        (_KERAS_SIGNUM, "signsgd_keras.MultiWorkerMajorityVoteStrategy"),
        cluster_of_workers,
        _EMPTY,
    ),
)
