"""Hugging Face's Trainer: a callback that lets its ranks vote and keeps every worker's momentum in its checkpoints."""

import os
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoint.atomic import PART, replace
from .checkpoint.gathered import gather_state, scatter_state
from .checkpoint.loading import OTHERS
from .enable import enable_majority_vote
from .optimizer import find_signum


class MajorityVoteCallback(TrainerCallback):
    """Let the ranks of a `transformers.Trainer` vote, from the begin of `train`.

    Trainer's own accumulation, clipping, schedules and checkpoints go on as ever. When it has written ``optimizer.pt``
    this file is written again with the momenta of all workers, in the first parameter group, and
    ``train(resume_from_checkpoint=…)`` hands them out, also with another number of ranks.

    Args:
        trainer: to which it is added, with a `Signum` for its optimizer.
        **options: those of `enable_majority_vote`.

    Raises:
        TypeError: for what is no Trainer; at the begin of `train`, if the optimizer is not a `Signum`.
        RuntimeError: at the begin of `train`, without torchrun.

    Example:
        >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=(Signum, {"lr": 1e-3}))  # doctest: +SKIP
        >>> trainer.add_callback(MajorityVoteCallback(trainer))  # doctest: +SKIP
        >>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP
    """

    def __init__(self, trainer: Trainer, **options: Any) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"MajorityVoteCallback needs the Trainer that it is added to, got {type(trainer).__name__}: "
                "trainer.add_callback(MajorityVoteCallback(trainer))"
            )
        self._trainer, self._options = trainer, options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Enable the vote on the model as Trainer has wrapped it, and give every worker its own momentum."""
        if not dist.is_initialized():
            raise RuntimeError(
                "MajorityVoteCallback lets ranks vote, and this process is alone: start it by torchrun, or leave the "
                "callback out"
            )
        optimizer = find_signum(self._trainer.optimizer)
        others = optimizer.param_groups[0].pop(OTHERS, None)
        enable_majority_vote(self._trainer.model_wrapped, optimizer, **self._options)
        if others is not None:
            scatter_state(optimizer, {**optimizer.state_dict(), OTHERS: others})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the momenta of all workers into the checkpoint that was written."""
        if args.save_only_model:
            return
        gathered = gather_state(find_signum(self._trainer.optimizer))
        others = gathered.pop(OTHERS, None)
        if others is None or not args.should_save:
            return
        first, *rest = gathered["param_groups"]
        gathered["param_groups"] = [{**first, OTHERS: others}, *rest]
        path = os.path.join(str(args.output_dir), f"checkpoint-{state.global_step}", "optimizer.pt")
        torch.save(gathered, path + PART)
        replace(path + PART, path)
