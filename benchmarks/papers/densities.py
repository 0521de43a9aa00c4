"""Densities of gradient, noise and curvature through the training of a GPT and a ResNet, and what they advise.

python -m benchmarks.papers.densities --text FILE --images DIR --out benchmarks/results/papers

Each is trained by a Lightning Trainer with AdamW and a `GeometryMonitor` that looks at every coordinate at every step.
One worker; the gradients are of one batch.
"""

import argparse
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from signsgd_core.advise import advise
from signsgd_core.geometry import NAMES
from signsgd_core.geometry_report import GeometryReport
from signsgd_lightning import GeometryMonitor

from .common import heading, publish
from .tasks import Images, Task, Text, add_arguments, text_of
from .training import AVERAGED, Job

RATES = {"gpt": 2e-3, "resnet": 1e-2}
SHOWN = ("gradient_density", "noise_density", "noise_ratio", "curvature_density", "curvature_ratio", "signal", "snr")


class Training(LightningModule):
    """A task's model under one of the averaged methods."""

    def __init__(self, task: Task, job: Job) -> None:
        super().__init__()
        self.task, self.job, self.model = task, job, task.model()
        self.source = np.random.default_rng(job.seed)

    def training_step(self, batch: int, index: int) -> Tensor:
        """Draw a batch and return its loss."""
        return self.task.loss(self.model, self.task.batch(self.task.global_batch, self.source))

    def configure_optimizers(self) -> Any:
        """Return the method's optimizer."""
        return AVERAGED[self.job.method](self.parameters(), lr=self.job.lr, weight_decay=self.job.weight_decay)

    def train_dataloader(self) -> Any:
        """Return as many numbers as there are steps."""
        return range(self.job.steps)


def measure(task: Task, job: Job, every: int) -> GeometryReport:
    """Train with a monitor that looks at all coordinates at every step, and return what it saw."""
    module = Training(task, job)
    aside = task.batch(task.global_batch, np.random.default_rng(99))

    def loss(of: Any) -> Tensor:
        frozen = [m for m in of.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in frozen:
            norm.track_running_stats = False  # nothing in the module may change
        value = task.loss(of.model, aside)
        for norm in frozen:
            norm.track_running_stats = True
        return value

    monitor = GeometryMonitor(every, every, 1 << 20, curvature_loss=loss, directory=None)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", max_epochs=1, callbacks=[monitor], **quiet).fit(module)
    return monitor.report


def table(name: str, task: Task, job: Job, report: GeometryReport) -> Iterator[str]:
    """Return the lines: the figures through training, and the advice."""
    yield f"\n{task.name}, {report.parameters:,} parameters, {job.method} with lr {job.lr:g}, one worker"
    yield f"{'step':>6}" + "".join(f"{shown:>20}" for shown in SHOWN)
    for record in report.records:
        values = [record[f"geometry/{shown}"] for shown in SHOWN]
        yield f"{record['step']:>6}" + "".join(f"{np.nan if value is None else value:>20.4f}" for value in values)
    yield from advise(report.records, 1)


def draw(reports: dict[str, GeometryReport], pyplot: Any) -> Any:
    """Return a figure of the densities and the ratios through training."""
    figure, panels = pyplot.subplots(
        len(reports), 2, figsize=(11, 4 * len(reports)), layout="constrained", squeeze=False
    )
    for (name, report), (left, right) in zip(reports.items(), panels, strict=True):
        steps = [record["step"] for record in report.records]
        for axes, names in ((left, NAMES[0:2] + NAMES[3:4]), (right, (NAMES[2], NAMES[4]))):
            for figure_name in names:
                values = [record[figure_name] for record in report.records]
                axes.plot(steps, [np.nan if v is None else v for v in values], marker=".", label=figure_name[9:])
            axes.set(xlabel="step", title=name)
            axes.legend()
        right.axhline(1, color="black", linewidth=0.8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--short", action="store_true", help="a few seconds, for tests: what it prints means little")
    parser.add_argument("--out", type=Path, help="folder for densities.txt and .png (default: save nothing)")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    small: dict[str, Any] = {"width": 32, "layers": 1} if options.short else {}
    tasks: dict[str, Task] = {"gpt": Text(text_of(options), **small)}
    tasks["resnet"] = Images(
        options.images, width=4 if options.short else 16, global_batch=16 if options.short else 128
    )
    steps, every = (12, 6) if options.short else (500, 100)
    lines, reports = [heading("densities")], {}
    for name, task in tasks.items():
        job = Job(name, "AdamW", RATES[name], 0.1, 1, steps)
        reports[name] = measure(task, job, every)
        lines += table(name, task, job, reports[name])
    publish("densities", lines, lambda pyplot: draw(reports, pyplot), options.out)


if __name__ == "__main__":
    main()
