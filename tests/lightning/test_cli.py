"""LightningCLI: the strategy and the optimizer by their names on the command line, or as classes in a YAML file."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningCLI

from signsgd_lightning import MajorityVoteStrategy
from tests.workers import Workers

from .models import QUIET, Net, Record, judge, record

YAML = """
trainer:
  strategy:
    class_path: signsgd_lightning.MajorityVoteStrategy
    init_args:
      find_unused_parameters: true
      gradient_as_bucket_view: false
      timeout: "0:00:25"
  callbacks:
    - class_path: signsgd_lightning.VoteMonitor
model:
  samples: 24
optimizer:
  class_path: signsgd_lightning.Signum
  init_args:
    lr: 0.125
    betas: [0.5, 0.25]
    verdict_momentum: 0.5
"""


class CliModel(Net):
    """What a LightningCLI user writes: no optimizer in the code."""

    def __init__(self, samples: int = 32) -> None:
        super().__init__(samples=samples)

    def on_train_start(self) -> None:
        optimizer: Any = self.trainer.optimizers[0]
        self.records = record(optimizer)
        self.strategy: Any = self.trainer.strategy


def _cli(*arguments: str) -> tuple[dict[str, Any], list[Record]]:
    usual = {**QUIET, "accelerator": "cpu", "devices": 2, "max_epochs": 1}
    cli = LightningCLI(
        CliModel, args=["fit", *arguments], trainer_defaults=usual, save_config_callback=None, seed_everything_default=3
    )
    assert type(cli.model.strategy) is MajorityVoteStrategy
    return {**cli.model.strategy._ddp_kwargs, "timeout": cli.model.strategy._timeout}, cli.model.records


def test_on_the_command_line(workers: Workers) -> None:
    optimizer = ("--optimizer=signsgd_lightning.Signum", "--optimizer.lr=0.0625", "--optimizer.zeros=positive")
    ranks = workers.run(2, _cli, "--trainer.strategy=majority_vote", *optimizer)
    judge([records[0] for _, records in ranks], zeros="positive")
    assert ranks[0][1][0].lrs == [0.0625] * 4


def test_a_variant_on_the_command_line(workers: Workers) -> None:
    strategy = "--trainer.strategy=majority_vote_find_unused_parameters_true"
    ranks = workers.run(2, _cli, strategy, "--optimizer=signsgd_lightning.Signum")
    judge([records[0] for _, records in ranks])
    assert all(arguments["find_unused_parameters"] is True for arguments, _ in ranks)


def test_in_a_yaml_file(tmp_path: Path, workers: Workers) -> None:
    (tmp_path / "config.yaml").write_text(YAML)
    ranks = workers.run(2, _cli, f"--config={tmp_path / 'config.yaml'}")
    judge([records[0] for _, records in ranks], betas=(0.5, 0.25), verdict_momentum=0.5)
    for arguments, (one,) in ranks:
        assert one.lrs == [0.125] * 3
        assert arguments["timeout"] == timedelta(seconds=25)
        assert arguments["find_unused_parameters"] is True
        assert arguments["gradient_as_bucket_view"] is False


LOCAL = """
trainer:
  strategy:
    class_path: signsgd_lightning.LocalVoteStrategy
    init_args:
      sync_every: 3
      outer_momentum: 0.5
optimizer:
  class_path: torch.optim.AdamW
  init_args:
    lr: 0.125
"""


class LocalModel(Net):
    """Without an optimizer in the code, and any in the configuration."""

    def on_train_end(self) -> None:
        strategy: Any = self.trainer.strategy
        self.rounds = strategy.local_steps.outer.rounds, strategy.options.sync_every, type(self.trainer.optimizers[0])


def _local_cli(*arguments: str) -> Any:
    usual = {**QUIET, "accelerator": "cpu", "devices": 2, "max_epochs": 1}
    cli = LightningCLI(LocalModel, args=["fit", *arguments], trainer_defaults=usual, save_config_callback=None)
    return cli.model.rounds


def test_local_steps(tmp_path: Path, workers: Workers) -> None:
    """By name: a round of 16 that closes early; from a file: of 3, and a last one of 1. They close before this hook."""
    named = workers.run(2, _local_cli, "--trainer.strategy=local_vote", "--optimizer=Adam")
    assert named == [(1, 16, torch.optim.Adam)] * 2
    (tmp_path / "local.yaml").write_text(LOCAL)
    assert workers.run(2, _local_cli, f"--config={tmp_path / 'local.yaml'}") == [(2, 3, torch.optim.AdamW)] * 2
