"""The strategies for Fabric: loops by hand whose ranks vote, at every step or on where local steps went."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from signsgd_core.adversaries import Adversary

from .. import _compat
from ..checkpoint.gathered import check_state, gather_state, scatter_state
from ..enable import agree_on_model, let_vote
from ..local_steps import LocalSteps
from ..local_steps.enable import let_step
from ..local_steps.options import LocalStepOptions
from ..sharding import refuse_sharded_model
from ..vote import VoteOptions
from ..vote.local_gradients import keep_local
from ..vote.options import VoteBetween
from .files import has_own_state, naming, warn_of_restarts, whole_file


class _WorkerStateStrategy(DDPStrategy):
    """Run DDP's ranks, each with state of its own that `fabric.save` and `fabric.load` keep."""

    def setup_environment(self) -> None:
        """Connect the ranks; warn where torchrun could not connect them again."""
        warn_of_restarts()
        super().setup_environment()

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Refuse an optimizer alone.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            f"{type(self).__name__} needs to know whose parameters the optimizer has: set both up together, by "
            "model, optimizer = fabric.setup(model, optimizer)"
        )

    def save_checkpoint(self, path: str | Path, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Write a whole file with every rank's own state of the optimizers; every rank must call it."""
        state = {name: gather_state(obj) if _is_own(obj) else obj for name, obj in state.items()}
        with whole_file(self, path) as target:
            super().save_checkpoint(target, state, *args, **kwargs)

    def load_checkpoint(
        self, path: str | Path, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file and give every rank its own state back, also where there are more ranks now or fewer.

        Raises:
            RuntimeError: if the file is truncated or something else altogether; if a state is another model's, of which
                what fits is loaded, and no optimizer's.
            KeyError: if it lacks something, and `strict`; then nothing was loaded.
            ValueError: if a state is another optimizer's; likewise.
        """
        with naming(path, "fabric.save", "fabric.load"):
            checkpoint = super().load_checkpoint(path, None, weights_only=weights_only)
        if not state:
            return checkpoint
        if isinstance(state, (nn.Module, Optimizer)):
            self._load(state, checkpoint, strict)
            return {}
        missing = [name for name in state if name not in checkpoint]
        if strict and missing:
            raise KeyError(f"{path} has no {missing[0]!r}, only {', '.join(map(repr, checkpoint))}: pass strict=False")
        found = [name for name in state if name in checkpoint]
        for name in found:
            if _is_own(state[name]):
                check_state(state[name], checkpoint[name])
        for name in sorted(found, key=lambda name: not isinstance(state[name], nn.Module)):
            if hasattr(state[name], "load_state_dict"):
                self._load(state[name], checkpoint.pop(name), strict)
            else:
                state[name] = checkpoint.pop(name)
        return checkpoint

    def _load(self, obj: Any, state: Any, strict: bool) -> None:
        if isinstance(obj, nn.Module):
            self.load_module_state_dict(obj, state, strict)
        elif _is_own(obj):
            scatter_state(obj, state)
        else:
            obj.load_state_dict(state)


class FabricMajorityVoteStrategy(_WorkerStateStrategy):
    """Run DDP with a majority vote of all ranks at every `Signum` step, for `lightning.fabric.Fabric`.

    ``fabric.setup(model, optimizer)`` enables the vote, ``fabric.clip_gradients`` clips each rank's own gradient, and
    ``fabric.save`` and ``fabric.load``, called on every rank, keep every worker's momentum in one file.

    Args:
        verify_every_n_steps: see `enable_majority_vote`, as of all but the last.
        adversaries: worker -> what it makes of its gradients before it votes.
        vote_between: "ranks" or "nodes".
        overlap: let ballots travel while the backward pass goes on.
        **kwargs: those of `lightning.fabric.strategies.DDPStrategy`.

    Raises:
        ValueError: for options outside their range.
        TypeError: at `setup`, if an optimizer is not a `Signum`.
        RuntimeError: at `setup`, if the ranks differ in model or settings; for an optimizer that is set up alone.

    Example:
        >>> from lightning.fabric import Fabric
        >>> type(Fabric(accelerator="cpu", devices=2, strategy="majority_vote").strategy).__name__
        'FabricMajorityVoteStrategy'
    """

    def __init__(
        self,
        verify_every_n_steps: int = 0,
        adversaries: Mapping[int, Adversary] | None = None,
        vote_between: VoteBetween = "ranks",
        overlap: bool = False,
        **kwargs: Any,
    ) -> None:
        self.options = VoteOptions(verify_every_n_steps, adversaries, vote_between, overlap)
        super().__init__(**kwargs)

    def setup_module(self, module: nn.Module) -> DistributedDataParallel:
        """Wrap the model in DDP, which leaves gradients local, so that only votes may step on them."""
        remedy = "take ModelParallelStrategy, and enable_majority_vote(model, optimizer, mesh=…) once both are set up"
        refuse_sharded_model(module, type(self).__name__, remedy)
        model = super().setup_module(module)
        keep_local(model, guard=True)
        return model

    def setup_module_and_optimizers(self, module: nn.Module, optimizers: list[Any], scheduler: Any = None) -> Any:
        """Wrap the model in DDP, once all ranks are sure to have the same, and let its optimizers vote."""
        assert dist.group.WORLD is not None
        agree_on_model(module, dist.group.WORLD)
        model = self.setup_module(module)
        let_vote(model, optimizers, self.options, place=(self.num_processes, self.local_rank))
        return model, optimizers, scheduler


class FabricLocalVoteStrategy(_WorkerStateStrategy):
    """Let every rank take steps of its own with any optimizer and vote on where they went, for Fabric.

    The model is not wrapped in DDP, so ``no_backward_sync`` has nothing to leave out. ``fabric.save`` closes the round
    first; before validation call ``fabric.strategy.local_steps.close_round()`` on every rank.

    Args:
        sync_every: `H`; see `enable_local_steps`, as of all but the last.
        outer_lr: η.
        outer_momentum: μ.
        verify_every_n_rounds: how often all ranks are compared; 0 for never.
        adversaries: rank -> what it makes of its displacements.
        **kwargs: those of `lightning.fabric.strategies.DDPStrategy` that concern processes.

    Attributes:
        local_steps: the rounds of the model that was set up last; `fabric.save` closes those of every model.
    """

    def __init__(
        self,
        sync_every: int = 16,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        verify_every_n_rounds: int = 0,
        adversaries: Mapping[int, Adversary] | None = None,
        **kwargs: Any,
    ) -> None:
        self.options = LocalStepOptions(sync_every, outer_lr, outer_momentum, verify_every_n_rounds, adversaries)
        super().__init__(**kwargs)
        _compat.check_ddp_options(self)
        self._rounds = dict[nn.Module, LocalSteps]()
        _compat.leave_backward_alone(self)

    @property
    def local_steps(self) -> LocalSteps | None:
        """The rounds of the model that was set up last; None before one is."""
        return next(reversed(self._rounds.values()), None)

    def setup_module(self, module: nn.Module) -> Any:
        """Leave the model as it is: every rank keeps its own gradients."""
        return module

    def setup_module_and_optimizers(self, module: nn.Module, optimizers: list[Any], scheduler: Any = None) -> Any:
        """Let the optimizers take steps of their own."""
        local = let_step(module, optimizers, self.options)
        self._rounds.pop(module, None)  # those of a model that is set up again would compare what is not common yet
        self._rounds[module] = local
        return module, optimizers, scheduler

    def save_checkpoint(self, path: str | Path, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Close the round and write a whole file; see `fabric.save`."""
        for local in self._rounds.values():
            local.close_round()
        super().save_checkpoint(path, state, *args, **kwargs)

    def _load(self, obj: Any, state: Any, strict: bool) -> None:
        super()._load(obj, state, strict)
        for local in self._rounds.values() if isinstance(obj, nn.Module) else ():
            local.keep_loaded(obj)


def _is_own(obj: Any) -> bool:
    return isinstance(obj, Optimizer) and has_own_state(obj)
