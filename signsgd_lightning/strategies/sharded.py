"""The Lightning strategy for sharded models: copies of a model vote, each sharded as `configure_model` says."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from signsgd_core import check_count
from signsgd_core.adversaries import Adversary

from .. import _compat
from ..checkpoint import workers
from ..checkpoint.sharded import together, whole_directory
from ..enable import let_vote
from ..optimizer import find_signum, see_through
from ..sharding import sharded
from ..vote import VoteOptions
from ..vote.agreement import Purpose, agree
from ..vote.local_gradients import release
from ..vote.transport import PointToPoint
from .common import CommonStrategy
from .files import check_directory, naming

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Size = int | Literal["auto"]


class ShardedMajorityVoteStrategy(CommonStrategy, ModelParallelStrategy):
    """Run copies of a sharded model that vote at every `Signum` step: between them travels one bit a parameter.

    It is Lightning's `ModelParallelStrategy` with ``"replicate"`` as one more dimension of ``self.device_mesh``.
    ``configure_model`` stays as it is: ``fully_shard(…, mesh=self.device_mesh["data_parallel"])`` and
    ``parallelize_module(…, self.device_mesh["tensor_parallel"], plan)`` act inside of one copy.

    Checkpoints are directories as Lightning writes them, with a directory in them for the optimizers of each copy. They
    open on other numbers of ranks and of copies.

    Args:
        data_parallel_size: ranks among which a copy is sharded by FSDP. "auto" is what the others leave; where
            `replicate_size` is "auto", too, the ranks of a node, so that nodes vote.
        tensor_parallel_size: ranks in a tensor-parallel group.
        replicate_size: copies that vote. "auto" is what the others leave.
        verify_every_n_steps: how often all ranks make sure that copies have the same parameters and verdict momenta,
            bit for bit (`RanksDifferError` if not); 0 for never.
        adversaries: copy -> what each of its ranks makes of its gradients before it votes
            (`signsgd_core.adversaries`), to try what a vote withstands.
        **kwargs: those of `lightning.pytorch.strategies.ModelParallelStrategy`, but for
            ``save_distributed_checkpoint=False``.

    Raises:
        ValueError: for sizes below 1, or that are not the ranks there are; for ``save_distributed_checkpoint=False``;
            at the start of `fit` for a model that `configure_model` has not sharded.
        TypeError: before the first step, if an optimizer is not a `Signum`.
        RuntimeError: before the first step, if the ranks differ in model or settings.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> strategy = ShardedMajorityVoteStrategy(data_parallel_size=2)
        >>> type(Trainer(accelerator="cpu", devices=4, strategy=strategy, logger=False).strategy).__name__
        'ShardedMajorityVoteStrategy'
    """

    def __init__(
        self,
        data_parallel_size: Size = "auto",
        tensor_parallel_size: int = 1,
        replicate_size: Size = "auto",
        verify_every_n_steps: int = 0,
        adversaries: Mapping[int, Adversary] | None = None,
        **kwargs: Any,
    ) -> None:
        if not kwargs.get("save_distributed_checkpoint", True):
            raise ValueError(
                "save_distributed_checkpoint=False makes one file with the momenta of one copy for all: leave it out, "
                "and checkpoints are directories with the momenta of all"
            )
        for name, size in (("replicate_size", replicate_size), ("data_parallel_size", data_parallel_size)):
            if size != "auto":
                check_count(name, size, 1)
        check_count("tensor_parallel_size", tensor_parallel_size, 1)
        self._sizes = replicate_size, data_parallel_size, tensor_parallel_size
        self.options = VoteOptions(verify_every_n_steps, adversaries)
        super().__init__(data_parallel_size, tensor_parallel_size, **kwargs)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which part of the data is this rank's: the ranks of a tensor-parallel group have the same."""
        alike = self.device_mesh["tensor_parallel"].size()
        return {"num_replicas": self.world_size // alike, "rank": self.global_rank // alike}

    def setup_environment(self) -> None:
        """Connect the ranks and lay them out as a mesh, copy by copy."""
        sizes = _resolve(*self._sizes, self.num_nodes, self.num_processes)
        _compat.set_parallel_sizes(self, self.num_nodes * self.num_processes, 1)  # Lightning's own mesh is of no use
        super().setup_environment()
        _agree(sizes, self.root_device)
        names = ("replicate", "data_parallel", "tensor_parallel")
        _compat.show_mesh(self, init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names))
        self._inside = _own_group(sizes[1] * sizes[2])

    def setup(self, trainer: "Trainer") -> None:
        """Set up the optimizers, then let them vote."""
        self._refuse_clipping_of_scaled(trainer)
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        assert self.model is not None
        if self._inside.size() > 1 and not sharded(self.model.parameters()):
            raise ValueError(
                f"configure_model of {type(self.model).__name__} sharded nothing, and a copy of the model has "
                f"{self._inside.size()} ranks: call fully_shard(…, mesh=self.device_mesh['data_parallel']) there, or "
                "take strategy='majority_vote'"
            )
        let_vote(self.model, self._stepping, self.options, self.device_mesh.get_group("replicate"))
        for optimizer in self._stepping:
            find_signum(optimizer).restored_apart = True

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return this rank's shards where they are: Lightning would move them, and torch then refuses dtypes."""
        assert self.model is not None
        return get_optimizer_state_dict(self.model, see_through(optimizer))

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a directory that has its name only when it is whole; after an exception nothing.

        Raises:
            ValueError: for a path that is on no local or mounted file system.
            RuntimeError: on all ranks, if one could not write.
        """
        if self._interrupted:
            rank_zero_warn(f"{filepath} is not saved: after an exception this rank has a part of the model alone")
            return
        check_directory(filepath, storage_options)
        rest = dict(checkpoint)
        states = rest.pop("optimizer_states", [])
        with whole_directory(self.broadcast(os.fspath(filepath))) as (part, failed):
            save = super().save_checkpoint
            together(lambda: save(rest, part), failed)
            if states:
                workers.save_states(states, part, self._worker, self._inside, failed)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the weights, and for `fit` the momenta that this rank's copy inherits.

        Raises:
            ValueError: for `fit`, if it has no momenta of copies, or lacks those of one.
            RuntimeError: on all ranks, if one could not read what it needs.
        """
        path, optimizers = self.broadcast(os.fspath(checkpoint_path)), self.optimizers
        if optimizers:
            workers.check(path)
        self.optimizers = []  # else Lightning looks for their states beside the weights
        try:
            with naming(path, "trainer.save_checkpoint", "trainer.fit"):
                checkpoint = super().load_checkpoint(path, weights_only)
        finally:
            self.optimizers = optimizers
        assert self.model is not None
        if optimizers:
            workers.load_states(path, self.model, self._stepping, self._worker, self._inside)
        return checkpoint

    def teardown(self) -> None:
        """Let other optimizers have the model."""
        if self.model is not None:
            release(self.model)
        super().teardown()

    @property
    def _worker(self) -> tuple[int, int]:
        """The number of this rank's copy, and how many there are."""
        size = self._inside.size()
        return self.global_rank // size, self.world_size // size


def _agree(sizes: tuple[int, int, int], device: torch.device) -> None:
    """Make sure that all ranks are about to make the same mesh: else they would wait for each other."""
    world = dist.group.WORLD
    assert world is not None
    everyone, nothing = PointToPoint(world), torch.ones(0, dtype=torch.bool, device="cpu")
    lines = ["replicate_size={}, data_parallel_size={}, tensor_parallel_size={}".format(*sizes)]
    agree(everyone, lines, nothing, everyone.wire(device), Purpose.ENABLE)


def _own_group(size: int) -> dist.ProcessGroup:
    """Return the group of this rank among groups of so many ranks, one behind the other."""
    world = dist.group.WORLD
    assert world is not None
    group: dist.ProcessGroup
    group, _ = dist.new_subgroups(size, timeout=_compat.timeout(world))  # type: ignore[no-untyped-call]
    return group


def _resolve(replicate: Size, data: Size, tensor: int, nodes: int, ranks_per_node: int) -> tuple[int, int, int]:
    """Return the sizes of the mesh, with numbers in the place of "auto".

    Raises:
        ValueError: if they do not make up the ranks there are.
    """
    world = nodes * ranks_per_node
    copies = nodes if replicate == "auto" else int(replicate)
    shards = max(world // (copies * tensor), 1) if data == "auto" else int(data)
    if replicate == "auto":
        copies = max(world // (shards * tensor), 1)
    ranks = copies * shards * tensor
    if ranks != world:
        raise ValueError(
            f"replicate_size={copies}, data_parallel_size={shards} and tensor_parallel_size={tensor} are {ranks} "
            f"ranks, and there are {world}: let them multiply to {world}, or leave one out"
        )
    if world > 1 and copies == 1:
        rank_zero_warn(
            f"nothing votes: all {world} ranks shard one copy of the model. For copies that vote take a "
            f"data_parallel_size below {shards}"
        )
    return copies, shards, tensor
