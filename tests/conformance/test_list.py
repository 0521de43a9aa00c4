"""The list of front ends is complete, and what it leaves out has a reason."""

import inspect
import pkgutil

import keras
import lightning.pytorch as pl
import pytest
import tensorflow as tf
import torch

import signsgd_keras
import signsgd_lightning
from tests import devices  # noqa: F401  before TensorFlow runs

from .cases import SHAPES, cases, pairs
from .front_ends import FRONT_ENDS, FrontEnd

NOT_FOR_TRAINING = {
    "common": "what backends share",
    "numpy": "Keras trains no model on it",
    "openvino": "Keras trains no model on it",
}
"""Packages beside Keras' backends that no front end is for."""

NO_FRONT_END = {
    "signsgd_keras.LossScaleOptimizer": "scales the loss of a Signum; tests/faults/test_overflows_* judge it",
    "signsgd_lightning.ElasticVoteStrategy": "workers come and go; tests/lightning/test_elastic_vote.py judges it",
    "signsgd_lightning.LocalVoteStrategy": "votes on displacements; tests/lightning/test_local_vote.py judges it",
    "signsgd_lightning.ShardedMajorityVoteStrategy": "on shards; tests/lightning/test_sharded_fit.py judges it",
    "signsgd_lightning.enable_elastic_local_steps": "workers come and go; test_elastic_rounds.py judges it",
    "signsgd_lightning.enable_elastic_vote": "workers come and go; tests/lightning/test_elastic.py judges it",
    "signsgd_lightning.enable_local_steps": "votes on displacements; tests/lightning/test_local_steps.py judges it",
    "signsgd_lightning.gather_state": "collects the momenta of all ranks and takes no step",
    "signsgd_lightning.scatter_state": "hands each rank its momentum and takes no step",
    "signsgd_lightning.signmuon_groups": "makes parameter groups and takes no step",
}
"""Public names that neither step nor vote themselves."""

KINDS = (
    torch.optim.Optimizer,
    pl.strategies.Strategy,
    keras.optimizers.Optimizer,
    tf.distribute.Strategy,
    tf.distribute.CrossDeviceOps,
)
"""What steps or votes."""


def covered() -> set[str]:
    return {name for end in FRONT_ENDS for name in end.covers}


@pytest.mark.parametrize("package", [signsgd_keras, signsgd_lightning], ids=lambda package: package.__name__)
def test_all_that_steps_or_votes_has_a_front_end(package: object) -> None:
    name = package.__name__  # type: ignore[attr-defined]
    public = {key: getattr(package, key) for key in package.__all__}  # type: ignore[attr-defined]
    steps = {
        f"{name}.{key}"
        for key, value in public.items()
        if inspect.isfunction(value) or (inspect.isclass(value) and issubclass(value, KINDS))
    }
    assert steps, "nothing was found, so nothing was checked"
    exempt = {one for one in NO_FRONT_END if one.startswith(f"{name}.")}
    assert exempt <= steps, "exempt, but no longer there"
    assert steps - exempt == {one for one in covered() if one.startswith(f"{name}.")}


def test_every_backend_of_keras_has_a_front_end() -> None:
    found = {module.name for module in pkgutil.iter_modules(keras.src.backend.__path__) if module.ispkg}
    assert set(NOT_FOR_TRAINING) < found
    assert {f"backend:{name}" for name in found - set(NOT_FOR_TRAINING)} == {
        one for one in covered() if one.startswith("backend:")
    }


def test_names_are_unique() -> None:
    assert len({end.name for end in FRONT_ENDS}) == len(FRONT_ENDS)


@pytest.mark.parametrize("end", FRONT_ENDS, ids=lambda end: end.name)
def test_what_is_left_out_has_a_reason(end: FrontEnd) -> None:
    reasons = [end.skips(case) for case in cases()]
    assert None in reasons, "it runs no case"
    for reason in [*reasons, *end.without.values()]:
        assert reason is None or len(reason.split()) > 3, f"{reason!r} is no reason"
    assert set(end.without) < set(range(len(SHAPES)))


@pytest.mark.parametrize("end", FRONT_ENDS, ids=lambda end: end.name)
def test_every_pair_of_options_is_run(end: FrontEnd) -> None:
    """That is possible at all: of the cases that it skips for a reason, none is asked for."""
    possible = set().union(*(pairs(case) for case in cases() if end.skips(case) is None))
    assert set().union(*(pairs(case) for case in end.cases)) == possible
    assert all(end.skips(case) is None for case in end.cases)
    assert len(end.cases) <= 48


@pytest.mark.parametrize("ecosystem", ["core", "torch", "lightning", "keras"])
def test_every_pair_of_options_is_run_in_each_ecosystem(ecosystem: str) -> None:
    """No pair is skipped by all front ends that could run it."""
    ends = [end for end in FRONT_ENDS if end.name.startswith(ecosystem)]
    found = set().union(*(pairs(case) for end in ends for case in end.cases))
    refused_by_keras = ("absent", "somewhere") if ecosystem == "keras" else None
    missing = {pair for case in cases() for pair in pairs(case) if refused_by_keras not in pair} - found
    assert not missing
