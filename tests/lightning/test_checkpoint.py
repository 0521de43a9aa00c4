"""Checkpoints hold the momentum of every rank, resume bit for bit, and open on other numbers of ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

import signsgd_core as core
from signsgd_lightning import MajorityVoteStrategy, Signum, gather_state, scatter_state
from signsgd_lightning.checkpoint.loading import OTHERS
from tests.tiers import nightly_where
from tests.workers import Workers

from .models import Net, trainer

SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "signum": ({}, {}),
    "lion-warmup": ({"betas": (0.9, 0.99), "warmup_steps": 11}, {}),
    "both-momenta-accumulated": ({"verdict_momentum": 0.5}, {"accumulate_grad_batches": 2}),
    "bf16": ({}, {"precision": "bf16-mixed"}),
    "bf16-momentum": ({"momentum_dtype": torch.bfloat16}, {}),
    "verdict-momentum": ({"betas": (0.0, 0.0), "verdict_momentum": 0.8}, {}),
}
"""Name -> settings of `Signum`, settings of the Trainer."""

COVERING = ("both-momenta-accumulated", "bf16-momentum")
FEWER = nightly_where(lambda name: name not in COVERING, (name for name in SETTINGS if name != "bf16"))
"""Names for checkpoints of other kinds; nightly where the two that run always cover what is kept."""


class Scheduled(Net):
    """`Net` with a schedule, so that a checkpoint has one to restore."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [StepLR(optimizer, 1, 0.5)]


def _momenta(optimizer: Any) -> list[Any]:
    state = [optimizer.state[p].get("momentum") for group in optimizer.param_groups for p in group["params"]]
    return [None if m is None else m.float().numpy().copy() for m in state]  # NumPy has no bfloat16


def _train(folder: str, signum: Any, settings: Any, epochs: int, resume: str | None = None) -> tuple[list[Any], Any]:
    model = Scheduled(**signum)
    save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    run = trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=[save], **settings)
    run.fit(model, ckpt_path=resume)
    return [p.detach().float().numpy().copy() for p in model.parameters()], _momenta(run.optimizers[0])


def _same(ours: Any, theirs: Any) -> bool:
    return all(
        x is y is None or x.tobytes() == y.tobytes()
        for a, b in zip(ours, theirs, strict=True)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_resumed_is_uninterrupted(name: str, tmp_path: Path, workers: Workers) -> None:
    signum, settings = SETTINGS[name]
    straight = workers.run(3, _train, str(tmp_path / "a"), signum, settings, 4)
    workers.run(3, _train, str(tmp_path / "b"), signum, settings, 2)
    resumed = workers.run(3, _train, str(tmp_path / "c"), signum, settings, 4, str(tmp_path / "b" / "epoch=1.ckpt"))
    for ours, theirs in zip(straight, resumed, strict=True):
        assert _same(ours, theirs)
    private = signum.get("betas") != (0.0, 0.0)
    momenta = [rank[1][0] for rank in straight]
    assert (momenta[0] is not None) == private
    if private:
        assert not np.array_equal(momenta[0], momenta[1]), "ranks that had the same data prove nothing"


def test_nothing_private_makes_an_ordinary_checkpoint(tmp_path: Path, workers: Workers) -> None:
    workers.run(2, _train, str(tmp_path), *SETTINGS["verdict-momentum"], 1)
    (state,) = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["optimizer_states"]
    assert set(state) == {"state", "param_groups"}


def test_the_file_opens_without_us(tmp_path: Path, workers: Workers) -> None:
    ranks = workers.run(3, _train, str(tmp_path), {}, {}, 1)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    (state,) = checkpoint["optimizer_states"]
    for key, rows in state[OTHERS]["momentum"].items():
        expected = np.stack([rank[1][key] for rank in ranks])
        np.testing.assert_array_equal(np.stack([state["state"][key]["momentum"], *rows]), expected)
    model = Net.load_from_checkpoint(tmp_path / "epoch=0.ckpt", map_location="cpu")
    np.testing.assert_array_equal(next(model.parameters()).detach(), ranks[0][0][0])
    optimizer = Signum(model.parameters())
    with pytest.warns(UserWarning, match="rank 0's was loaded"):
        optimizer.load_state_dict(state)
    assert _same([_momenta(optimizer)], [ranks[0][1]])


def test_narrow_momenta_stay_narrow(tmp_path: Path, workers: Workers) -> None:
    workers.run(2, _train, str(tmp_path), *SETTINGS["bf16-momentum"], 1)
    (state,) = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["optimizer_states"]
    kept = [
        *(rows for rows in state[OTHERS]["momentum"].values()),
        *(entry["momentum"] for entry in state["state"].values()),
    ]
    assert len(kept) == 2 * len(list(Net().parameters()))
    assert {momentum.dtype for momentum in kept} == {torch.bfloat16}


def test_the_mean_of_narrow_momenta_is_rounded_once(workers: Workers) -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = Signum([p], momentum_dtype=torch.bfloat16)
    state = optimizer.state_dict()
    rows = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)  # 1 + 2^-8 is no bfloat16, and goes to 1
    state = {**state, "state": {0: {"momentum": rows[0]}}, OTHERS: {"momentum": {0: rows[1:]}}}
    scatter_state(optimizer, state)
    expected = ((1 + 2.0**-7) / 3 * torch.ones(1)).bfloat16()
    assert torch.equal(optimizer.state[p]["momentum"], expected)
    assert not torch.equal((rows[0] + rows[1] + rows[2]) / 3, expected), "rounded twice it is the same"


def _plain_ddp(folder: str) -> tuple[list[str], list[Any]]:
    """Resume under Lightning's own DDP strategy."""
    import warnings

    model = Scheduled()
    run = trainer(max_epochs=1, strategy="ddp")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(model, ckpt_path=str(Path(folder, "epoch=0.ckpt")))
    return [str(w.message) for w in caught if "rank 0's" in str(w.message)], _momenta(run.optimizers[0])


def test_opens_under_plain_ddp_and_back(tmp_path: Path, workers: Workers) -> None:
    ranks = workers.run(2, _train, str(tmp_path), {}, {}, 1)
    for warned, momenta in workers.run(2, _plain_ddp, str(tmp_path)):
        assert len(warned) == 1
        assert _same([momenta], [ranks[0][1]])
    workers.run(2, _train, str(tmp_path / "plain"), {}, {"strategy": "ddp"}, 1)
    workers.run(2, _train, str(tmp_path / "ours"), {}, {}, 2, str(tmp_path / "plain" / "epoch=0.ckpt"))


def _resume_only(path: str) -> list[Any]:
    """Open a checkpoint that has all its epochs behind it."""
    _, momenta = _train(str(Path(path).parent / "unused"), {}, {}, 1, path)
    return list(momenta)


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 3), (3, 1), (1, 4), (3, 2)])
def test_other_numbers_of_ranks(old: int, new: int, tmp_path: Path, workers: Workers) -> None:
    before = workers.run(old, _train, str(tmp_path), {}, {}, 1)
    after = workers.run(new, _resume_only, str(tmp_path / "epoch=0.ckpt"))
    for key in range(len(before[0][1])):
        expected = core.redistribute(np.stack([rank[1][key] for rank in before]), new)
        np.testing.assert_array_equal(np.stack([rank[key] for rank in after]), expected)


def _vote(used: Callable[[int], list[int]]) -> tuple[Any, list[Any]]:
    """Plain DDP: one vote in which a rank has gradients for some parameters only, then gather and scatter."""
    from torch.nn.parallel import DistributedDataParallel

    from signsgd_lightning import enable_majority_vote

    rank = dist.get_rank()
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Linear(2, 2, bias=False) for _ in range(3)])
    model = DistributedDataParallel(layers, find_unused_parameters=True)
    optimizer = Signum(model.parameters())
    enable_majority_vote(model, optimizer)
    for k, p in enumerate(model.parameters()):
        p.grad = torch.full((2, 2), float(rank + 1)) if k in used(rank) else None
    optimizer.step()
    before = _momenta(optimizer)
    states: list[Any] = [gather_state(optimizer)]
    dist.broadcast_object_list(states, 0)
    scatter_state(optimizer, states[0])
    assert all(x is None or np.array_equal(x, y) for x, y in zip(before, _momenta(optimizer), strict=True))
    return states[0], before


def _some(rank: int) -> list[int]:
    return [0, 2] if rank == 0 else [1, 2]


def test_a_momentum_that_only_some_ranks_have(workers: Workers) -> None:
    for state, before in workers.run(2, _vote, _some):
        assert set(state[OTHERS]["momentum"]) == {0, 1, 2}
        assert sum(m is None for m in before) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("param_groups"), "has no 'param_groups'"),
        (lambda s: s["state"][0].update(momentum=torch.ones(3)), r"momentum of parameter 0 must have its shape \(2,\)"),
        (
            lambda s: s[OTHERS]["momentum"].update({0: torch.ones(1, 3)}),
            r"parameter 0 must be rows .* shape \(2,\), got \(1, 3\)",
        ),
        (lambda s: s[OTHERS]["momentum"].update({1: torch.ones(2, 2)}), "must all be of one number of workers"),
    ],
)
def test_a_wrong_state_is_refused_whole(change: Callable[[Any], Any], message: str) -> None:
    parameters = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    optimizer = Signum(parameters)
    for p in parameters:
        p.grad = torch.ones(2)
    optimizer.step()
    state: dict[str, Any] = optimizer.state_dict()
    state = {**state, "state": {k: {n: v * 2 for n, v in e.items()} for k, e in state["state"].items()}}
    state[OTHERS] = {"momentum": {0: torch.ones(1, 2), 1: torch.ones(1, 2)}}
    change(state)
    before: list[Tensor] = [optimizer.state[p]["momentum"].clone() for p in parameters]
    with pytest.raises(ValueError, match=message):
        scatter_state(optimizer, state)
    for p, m in zip(parameters, before, strict=True):
        assert torch.equal(optimizer.state[p]["momentum"], m)


class Placed(Net):
    """Has a hyperparameter that torch loads only from a file that is trusted."""

    def __init__(self, data: Path = Path("data")) -> None:
        super().__init__()
        self.save_hyperparameters()


def _trusted(path: str, kind: Any) -> str:
    """Save, and go on without trust, which says something, and with it."""
    strategy: Any = lambda: MajorityVoteStrategy(state_dict_type=kind)  # noqa: E731
    run = trainer(strategy=strategy())
    run.fit(Placed())
    run.save_checkpoint(path)
    with pytest.raises(RuntimeError) as caught:
        trainer(strategy=strategy(), max_epochs=2).fit(Placed(), ckpt_path=path)
    run = trainer(strategy=strategy(), max_epochs=2)
    run.fit(Placed(), ckpt_path=path, weights_only=False)
    assert run.current_epoch == 2
    return str(caught.value)


@pytest.mark.parametrize("kind", ["full", "sharded"])
def test_a_file_that_is_to_be_trusted_is_not_called_broken(kind: str, tmp_path: Path, workers: Workers) -> None:
    path = str(tmp_path / "last.ckpt")
    for said in workers.run(2, _trusted, path, kind):
        assert said.startswith(f"{path} holds pathlib.PosixPath, which torch loads only from a file that you trust")
        assert "torch.serialization.add_safe_globals([pathlib.PosixPath])" in said
        assert "trainer.fit(…, weights_only=False)" in said
