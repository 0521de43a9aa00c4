"""The Lightning strategy: DDP whose ranks vote at the optimizer's step."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.parallel import DistributedDataParallel

from signsgd_core.adversaries import Adversary

from .. import _compat
from ..checkpoint.loading import check
from ..enable import agree_on_model, let_vote
from ..sharding import refuse_sharded_model
from ..vote import VoteOptions
from ..vote.local_gradients import release
from ..vote.options import VoteBetween
from .base import StateDictType, WorkerStateStrategy

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class MajorityVoteStrategy(WorkerStateStrategy):
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
            excludes gradient clipping, gradient scalers, several optimizers, adversaries and a vote between nodes.
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
        state_dict_type: StateDictType = "full",
        vote_between: VoteBetween = "ranks",
        overlap: bool = False,
        **kwargs: Any,
    ) -> None:
        self.options = VoteOptions(verify_every_n_steps, adversaries, vote_between, overlap)
        if vote_between == "nodes" and state_dict_type == "sharded":
            raise ValueError(
                "a vote between nodes saves one file: leave out state_dict_type='sharded' (it resumes from a sharded "
                "checkpoint of a vote between ranks)"
            )
        super().__init__(state_dict_type, **kwargs)

    @property
    def _ranks_per_worker(self) -> int:
        return self.num_processes if self.options.vote_between == "nodes" else 1

    def configure_ddp(self) -> None:
        """Wrap the model, once all ranks are sure to have the same: DDP would leave some with a lost connection."""
        assert self.model is not None
        assert self.lightning_module is not None
        assert dist.group.WORLD is not None
        refuse_sharded_model(self.model, type(self).__name__, "take ShardedMajorityVoteStrategy")
        agree_on_model(self.model, dist.group.WORLD)
        # It saves copies. A loop by hand may keep gradients, which the next backward pass would overwrite.
        automatic = self.lightning_module.automatic_optimization
        _compat.ddp_options(self).setdefault("gradient_as_bucket_view", automatic)
        super().configure_ddp()

    def setup(self, trainer: "Trainer") -> None:
        """Set up DDP and the optimizers, then let them vote."""
        self.options.exclude({"gradient_clip_val": bool(trainer.gradient_clip_val)})
        self._refuse_clipping_of_scaled(trainer)
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING:
            assert isinstance(self.model, DistributedDataParallel)
            let_vote(self.model, self._stepping, self.options, place=(self.num_processes, self.local_rank))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the weights, once the optimizers' states are sure to be of `Signum`, where they are wanted, too."""
        assert self.lightning_module is not None
        if self.lightning_module.trainer.state.fn == TrainerFn.FITTING:
            for state in checkpoint.get("optimizer_states", ()):
                check(state)
        super().load_model_state_dict(checkpoint, strict)

    def teardown(self) -> None:
        """Let other optimizers have the model."""
        if isinstance(self.model, DistributedDataParallel):
            release(self.model)
        super().teardown()
