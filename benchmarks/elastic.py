"""One training on 4, 2, 3, 1 and again 4 workers beside one that has 4 all the time: the loss of both.

python -m benchmarks.elastic

Every phase is a launch of its own that goes on from the last checkpoint. The demo's model and digits, Signum with
betas (0.9, 0.9), the same 96 images at each step whatever the number of workers, who share them out. A new worker
takes the momentum of an old one, a lost one's is averaged into another's (`signsgd_core.inherited`).
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler

from signsgd_core import demo
from signsgd_lightning import Signum
from signsgd_lightning.__main__ import LEARNING_RATES, Classifier, Images, network

PHASES, EPOCHS = (4, 2, 3, 1, 4), 4  # workers of each phase, and how many epochs it lasts
BATCH_SIZE = 96  # of all workers together
RESULTS = Path(__file__).parent / "results"


class Shares(Images):
    """The demo's images; each step's are the same for any number of workers that divides the batch."""

    def train_dataloader(self) -> DataLoader[Any]:
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.train, self._workers, self._rank, seed=self.seed, drop_last=True
        )
        return DataLoader(self.train, BATCH_SIZE // self._workers, sampler=sampler, drop_last=True)


class Observed(Classifier):
    """Logs the loss on the test images, too."""

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        super().validation_step(batch, index)
        loss = functional.cross_entropy(self(batch[0]), batch[1], reduction="sum") / self.tested
        self.log("test loss", loss, reduce_fx="sum", sync_dist=True)


class Recorder(pl.Callback):
    """Writes a line a step and a line an epoch, and ends the phase after its last epoch."""

    def __init__(self, folder: Path, until: int) -> None:
        self.path, self.until = folder / "curve.jsonl", until

    def _write(self, trainer: pl.Trainer, **values: float) -> None:
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                print(json.dumps({"workers": trainer.world_size, "step": trainer.global_step, **values}), file=file)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *batch: Any) -> None:
        loss = outputs["loss"].detach().clone()
        torch.distributed.all_reduce(loss)
        self._write(trainer, train=float(loss) / trainer.world_size)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        self._write(trainer, test=float(metrics["test loss"]), accuracy=float(metrics["accuracy"]))
        trainer.should_stop = trainer.current_epoch + 1 == self.until


def worker(folder: Path, until: int) -> None:
    """Train up to an epoch, from the last checkpoint if there is one; torchrun starts it once for each worker."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    pl.seed_everything(0, verbose=False)
    data = demo.load(None, folder)
    classes = int(data.train_labels.max()) + 1
    model = Observed(
        network(data.train_images.shape[1:], classes),
        lambda model: Signum(model.parameters(), LEARNING_RATES["Signum"]),
        len(data.test_labels),
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy="majority_vote",
        max_epochs=EPOCHS * len(PHASES),
        callbacks=[Recorder(folder, until), ModelCheckpoint(folder, save_last=True)],
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, Shares(data, seed=0), ckpt_path="last")


def run(phases: tuple[int, ...], folder: Path) -> list[dict[str, float]]:
    """Train phase by phase and return the recorded lines."""
    folder.mkdir()
    environment = {"GLOO_SOCKET_IFNAME": "lo", **os.environ, "OMP_NUM_THREADS": "1"}
    for phase, workers in enumerate(phases, 1):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
        until = EPOCHS * len(PHASES) * phase // len(phases)
        subprocess.run(
            [*torchrun, __file__, "--until", str(until), "--folder", str(folder)], env=environment, check=True
        )
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def print_table(elastic: list[dict[str, float]], undisturbed: list[dict[str, float]]) -> None:
    steps = int(undisturbed[-1]["step"]) // len(PHASES)
    print(f"{steps} steps a phase, {BATCH_SIZE} images a step; train: mean loss of the phase; test: at its end")
    print(f"{'':17}{'elastic':^30}{'4 workers':^30}")
    columns = f"{'train loss':>11}{'test loss':>10}{'accuracy':>9}"
    print(f"{'phase':>5}{'workers':>9}   {columns}{columns}")
    for phase, workers in enumerate(PHASES):
        row = f"{phase + 1:>5}{workers:>9}   "
        for curve in (elastic, undisturbed):
            lines = [line for line in curve if phase * steps < line["step"] <= (phase + 1) * steps]
            train = [line["train"] for line in lines if "train" in line]
            assert len(train) == steps
            end = [line for line in lines if "test" in line][-1]
            row += f"{sum(train) / len(train):>11.4f}{end['test']:>10.4f}{end['accuracy']:>9.1%}"
        print(row)


def save_plot(elastic: list[dict[str, float]], undisturbed: list[dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    length = undisturbed[-1]["step"] / len(PHASES)
    for phase, workers in enumerate(PHASES):
        axes.axvspan(phase * length, (phase + 1) * length, color="black", alpha=0.06 * (phase % 2), linewidth=0)
        axes.text((phase + 0.5) * length, 0.97, f"{workers} worker{'s' * (workers > 1)}", ha="center", va="top",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    for color, label, curve in (("C0", "4 workers throughout", undisturbed), ("C1", "4, 2, 3, 1, 4 workers", elastic)):
        train = [(line["step"], line["train"]) for line in curve if "train" in line]
        test = [(line["step"], line["test"]) for line in curve if "test" in line]
        axes.plot(*zip(*train, strict=True), color=color, linewidth=0.7, alpha=0.5)
        axes.plot(*zip(*test, strict=True), color=color, marker="o", markersize=3, label=label)
    axes.set(yscale="log", xlabel="step", ylabel="loss: training (thin), test (dots)")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--until", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.folder:
        worker(options.folder, options.until)
        return
    with tempfile.TemporaryDirectory() as folder:
        elastic = run(PHASES, Path(folder, "elastic"))
        undisturbed = run((max(PHASES),), Path(folder, "undisturbed"))
    print_table(elastic, undisturbed)
    save_plot(elastic, undisturbed, RESULTS / "elastic.png")


if __name__ == "__main__":
    main()
