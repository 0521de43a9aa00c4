"""The Lightning strategy: DDP whose ranks vote at the optimizer's step."""

import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch.nn.parallel import DistributedDataParallel

from signsgd_core.adversaries import Adversary

from . import _compat, registration
from .checkpoint.atomic import PART, check_target, remove_directory, replace
from .checkpoint.gathered import gather_state, scatter_state
from .checkpoint.loading import check
from .checkpoint.sharded import load_shards, save_shards
from .enable import agree_on_model, let_vote
from .optimizer import Signum, see_through
from .vote import VoteOptions
from .vote.failures import explain
from .vote.local_gradients import release
from .vote.options import VoteBetween

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class MajorityVoteStrategy(DDPStrategy):
    """Run DDP with a majority vote of all ranks at every `Signum` step: one bit per parameter each way.

    Args:
        verify_every_n_steps: how often all ranks make sure that they hold the same parameters and verdict momenta, bit
            for bit (`RanksDifferError` if not); 0 for never.
        adversaries: worker (a rank, or a node) -> what it makes of its gradients before it votes
            (`signsgd_core.adversaries`), to try what a vote withstands.
        state_dict_type: "full" for checkpoints that are one file with the momenta of all ranks, gathered on rank 0;
            "sharded" for directories, which all ranks must see, where each rank writes its own momenta and holds no
            other's. Either resumes from both.
        vote_between: "ranks", each of which is a worker; or "nodes", each of which is one worker whose gradient is the
            mean of its ranks', so that each rank keeps and votes on its share of the parameters
            (`signsgd_lightning.vote.topology.Nodes`). Checkpoints then hold the momenta of nodes, and either resumes
            from both.
        overlap: let ballots travel while the backward pass goes on (`signsgd_lightning.vote.schedule.DuringBackward`);
            excludes gradient clipping, gradient scalers, several optimizers and a vote between nodes.
        **kwargs: those of `lightning.pytorch.strategies.DDPStrategy`, but for communication hooks. ``timeout`` bounds
            how long a rank waits for a lost one. ``gradient_as_bucket_view`` is True unless given, or unless the
            module steps by hand: DDP then neither copies gradients into its buckets and back, nor keeps 4 bytes a
            parameter for them, but the next backward pass writes into gradients that were kept.

    Raises:
        ValueError: for a communication hook, another `state_dict_type` or `vote_between`, or a sharded checkpoint of
            a vote between nodes; for what `overlap` excludes; at the start of `fit` for a sharded checkpoint beside a
            CheckpointIO plugin, and for ``gradient_clip_val`` under a gradient scaler.
        TypeError: before the first step, if an optimizer is not a `Signum`.
        RuntimeError: before the first step, if the ranks differ in model or settings.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> Trainer(accelerator="cpu", devices=2, strategy="majority_vote", logger=False).strategy.__class__.__name__
        'MajorityVoteStrategy'
    """

    strategy_name = "majority_vote"

    def __init__(
        self,
        verify_every_n_steps: int = 0,
        adversaries: Mapping[int, Adversary] | None = None,
        state_dict_type: Literal["full", "sharded"] = "full",
        vote_between: VoteBetween = "ranks",
        overlap: bool = False,
        **kwargs: Any,
    ) -> None:
        hooks = [name for name in kwargs if name.startswith("ddp_comm_") and kwargs[name] is not None]
        if hooks:
            raise ValueError(f"a majority vote takes the place of a communication hook; leave out {', '.join(hooks)}")
        if state_dict_type not in ("full", "sharded"):
            raise ValueError(
                f"state_dict_type must be 'full' (one file) or 'sharded' (one directory), got {state_dict_type!r}"
            )
        self.options = VoteOptions(verify_every_n_steps, adversaries, vote_between, overlap)
        if vote_between == "nodes" and state_dict_type == "sharded":
            raise ValueError(
                "a vote between nodes saves one file: leave out state_dict_type='sharded' (it resumes from a sharded "
                "checkpoint of a vote between ranks)"
            )
        super().__init__(**kwargs)
        self.state_dict_type = state_dict_type

    def setup_environment(self) -> None:
        """Connect the ranks; warn where torchrun could not connect them again."""
        restarts, shared = (os.environ.get(f"TORCHELASTIC_{name}") for name in ("MAX_RESTARTS", "USE_AGENT_STORE"))
        if restarts not in (None, "0") and shared == "True":
            rank_zero_warn(
                "torchrun is to restart workers but shares its store with them, in which those of the next attempt find"
                " the addresses of this one's and fail to connect: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and start"
                " it with --standalone, or on several machines with --rdzv-backend c10d"
            )
        super().setup_environment()

    def configure_ddp(self) -> None:
        """Wrap the model, once all ranks are sure to have the same: DDP would leave some with a lost connection."""
        assert self.model is not None
        assert self.lightning_module is not None
        assert dist.group.WORLD is not None
        agree_on_model(self.model, dist.group.WORLD)
        # It saves copies. A loop by hand may keep gradients, which the next backward pass would overwrite.
        automatic = self.lightning_module.automatic_optimization
        _compat.ddp_options(self).setdefault("gradient_as_bucket_view", automatic)
        super().configure_ddp()

    def setup(self, trainer: "Trainer") -> None:
        """Set up DDP and the optimizers, then let them vote."""
        self.options.exclude({"gradient_clip_val": bool(trainer.gradient_clip_val)})
        scaler = getattr(self.precision_plugin, "scaler", None)
        if trainer.gradient_clip_val and scaler is not None:
            raise ValueError(
                f"gradient_clip_val={trainer.gradient_clip_val} cannot clip under precision='16-mixed', which scales "
                "gradients until the step: take precision='bf16-mixed', or clip in on_before_optimizer_step at the "
                "threshold times trainer.precision_plugin.scaler.get_scale()"
            )
        if self.state_dict_type == "sharded" and not self._writes_by_torch:
            raise ValueError(
                f"state_dict_type='sharded' would pass over {type(self.checkpoint_io).__name__}: leave that plugin "
                "out, or take state_dict_type='full'"
            )
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            assert isinstance(self.model, DistributedDataParallel)
            optimizers: Any = [o for o in self.optimizers if not _compat.stands_for_no_optimizer(o)]
            let_vote(self.model, optimizers, self.options, place=(self.num_processes, self.local_rank))
            for optimizer in optimizers:
                see_through(optimizer).unscale_at_step(scaler is not None)  # where it does, Lightning clips nothing

    @property
    def _writes_by_torch(self) -> bool:
        """Whether files are written by torch.save, at once, under the name that is asked for."""
        return type(self.checkpoint_io) is TorchCheckpointIO

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return an optimizer's state with the momenta of all ranks, or this rank's where each saves its own."""
        inner = see_through(optimizer)
        gather = isinstance(inner, Signum) and self.state_dict_type == "full" and not self._interrupted
        return gather_state(inner) if gather else super().optimizer_state(optimizer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, once the optimizers' states are sure to be of `Signum`, where they are wanted, too."""
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            for state in checkpoint.get("optimizer_states", ()):
                check(state)
        super().load_model_state_dict(checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every rank its own momentum back, also where there are more ranks now or fewer.

        Raises:
            ValueError: if there are not as many states as optimizers. None at all is fine: `on_load_checkpoint` may
                have thrown them away.
        """
        states = checkpoint["optimizer_states"]
        if states and len(states) != len(self.optimizers):
            raise ValueError(
                f"the checkpoint has the states of {len(states)} optimizers, and {len(self.optimizers)} are to go on: "
                "return as many from configure_optimizers, or set checkpoint['optimizer_states'] = [] in "
                "on_load_checkpoint to start their momentum anew"
            )
        for optimizer, state in zip(self.optimizers, states, strict=False):
            scatter_state(optimizer, state)  # type: ignore[arg-type]

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint so that what has that name is always a whole one, whenever the run is killed.

        With a CheckpointIO plugin it is that plugin's affair.

        Raises:
            IsADirectoryError: if something else than a checkpoint has that name.
            ValueError: for a sharded checkpoint that is not to be on a local or mounted file system.
        """
        local = _compat.is_local(filepath)
        if self.state_dict_type == "sharded" and not self._interrupted:
            if not local or storage_options is not None:
                raise ValueError(
                    "a sharded checkpoint must be a directory on a file system, without storage_options, got "
                    f"{filepath}: take such a path, or state_dict_type='full'"
                )
            save_shards(checkpoint, self.broadcast(os.fspath(filepath)))
        elif not self.is_global_zero or not local or not self._writes_by_torch:
            super().save_checkpoint(checkpoint, filepath, storage_options)
        else:
            check_target(os.fspath(filepath))
            part = f"{os.fspath(filepath)}{PART}"
            super().save_checkpoint(checkpoint, part, storage_options)
            replace(part, os.fspath(filepath))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, a file or a directory.

        Raises:
            RuntimeError: if a file is truncated or missing in a directory, holds code instead of tensors, or is
                something else altogether; of a directory on all ranks, also if only one saw it.
        """

        def read(path: str | Path) -> dict[str, Any]:
            return super(MajorityVoteStrategy, self).load_checkpoint(path, weights_only)

        try:
            if not os.path.isdir(checkpoint_path):
                return read(checkpoint_path)
            assert self.lightning_module is not None
            fitting = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
            ranks = self.num_processes if self.options.vote_between == "nodes" else 1  # of a worker
            worker, workers = self.global_rank // ranks, self.world_size // ranks
            return load_shards(os.fspath(checkpoint_path), read, worker, workers, momenta=fitting)
        except (EOFError, RuntimeError, UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RuntimeError(
                f"{checkpoint_path} is not a whole checkpoint as trainer.save_checkpoint writes it; take an older one, "
                f"nothing was loaded ({reason})"
            ) from error

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint so that a half removed directory never has its name."""
        if self.is_global_zero and os.path.isdir(filepath):
            remove_directory(os.fspath(filepath))
        else:
            super().remove_checkpoint(filepath)

    @property
    def _interrupted(self) -> bool:
        """Whether an exception ended the training on this rank: the others may be alive, and elsewhere."""
        module = self.lightning_module
        trainer = None if module is None else _compat.trainer_of(module)
        return trainer is not None and trainer.interrupted

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for all ranks; after an exception for none."""
        if not self._interrupted:
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return what rank `src` has; after an exception what this one has."""
        return obj if self._interrupted else super().broadcast(obj, src)

    def reduce(self, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Reduce a tensor over all ranks; after an exception over this one."""
        return tensor if self._interrupted else super().reduce(tensor, *args, **kwargs)

    def teardown(self) -> None:
        """Let other optimizers have the model, and other loops the optimizers."""
        if isinstance(self.model, DistributedDataParallel):
            release(self.model)
        for optimizer in map(see_through, self.optimizers):
            if isinstance(optimizer, Signum):
                optimizer.unscale_at_step(True)
        super().teardown()

    def on_exception(self, exception: BaseException) -> None:
        """Name the rank that was lost; let Lightning add its advice, and put this strategy's names into it."""
        super().on_exception(exception)
        lost = explain(exception, dist.group.WORLD) if dist.is_initialized() and dist.group.WORLD else None
        if lost:
            exception.args = (lost,)
        if exception.args and isinstance(exception.args[0], str):
            advice = exception.args[0].replace("'ddp_find", f"'{self.strategy_name}_find")
            exception.args = (advice.replace("=DDPStrategy", f"={type(self).__name__}"), *exception.args[1:])

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Register "majority_vote" with the variants that DDP itself registers."""
        registration.register(strategy_registry, cls)
