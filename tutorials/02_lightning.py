# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Majority vote in Lightning
#
# Two changed lines make a Lightning training vote:
#
# ```diff
# +from signsgd_lightning import Signum, signmuon_groups
#  …
#      def configure_optimizers(self):
# -        return torch.optim.AdamW(self.parameters(), lr=0.04)
# +        return Signum(signmuon_groups(self, lr=0.08, other_lr=0.016))
#  …
# -trainer = Trainer(devices=2, strategy="ddp")
# +trainer = Trainer(devices=2, strategy="majority_vote")
# ```
#
# In a notebook the names are `"ddp_notebook"` and `"majority_vote_notebook"`. They fork the processes, which works in
# scripts, too, so this file runs as either.

# %%
import csv
import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from signsgd_core.network import traffic
from signsgd_lightning import MajorityVoteStrategy, Signum, VoteMonitor, signmuon_groups

torch.set_num_threads(1)  # processes with running OpenMP threads are not safe to fork
for name in ("lightning.pytorch", "lightning.fabric", "torch.multiprocessing.spawn"):
    logging.getLogger(name).setLevel(logging.ERROR)  # no banners
warnings.filterwarnings("ignore")
plt.rcParams.update({"figure.dpi": 80, "figure.figsize": (6.5, 3.2), "figure.constrained_layout.use": True})
folder = TemporaryDirectory()

# %% [markdown]
# ## A model, trained four times
#
# The digits of scikit-learn and a module that takes its optimizer from outside, so that we can exchange it.

# %%
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order].float() / 16, labels[order]
train_set = TensorDataset(images[450:], labels[450:])


class Digits(LightningModule):
    def __init__(self, optimizer, cosine=True):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        self.optimizer, self.cosine = optimizer, cosine

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = self.optimizer(self.model)
        if not self.cosine:
            return optimizer
        schedule = CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def accuracy(self):
        return (self.model(images[:450]).argmax(1) == labels[:450]).float().mean().item()


def fit(optimizer, strategy="majority_vote_notebook", epochs=10, cosine=True, resume=None, **options):
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    place = {"accelerator": "cpu", "devices": 2, "default_root_dir": folder.name}
    options = {**quiet, **place, "strategy": strategy, "max_epochs": epochs, **options}
    model, trainer = Digits(optimizer, cosine), Trainer(**options)
    trainer.fit(model, DataLoader(train_set, batch_size=64, shuffle=True), ckpt_path=resume)
    return model, trainer


# %% [markdown]
# AdamW under plain DDP, and three votes: SignMuon, verdict momentum, and the papers' Signum, each on two processes,
# from the same weights, over the same batches, with the best learning rate of a small grid that we tried beforehand.
# The vote with verdict momentum also gets a `VoteMonitor`, which logs to whatever logger the trainer has.
#
# `signmuon_groups` splits the parameters: hidden matrices vote by the signs of their polar factors, all others by those
# of the direction itself, at a rate of their own.

# %%
logger = CSVLogger(folder.name, name="vote", version=0)
monitor = {"callbacks": [VoteMonitor()], "logger": logger, "log_every_n_steps": 1}
adamw, _ = fit(lambda model: torch.optim.AdamW(model.parameters(), lr=0.04), "ddp_notebook")
voted, trainer = fit(lambda model: Signum(model.parameters(), 0.02, (0, 0), verdict_momentum=0.8), **monitor)
signum, _ = fit(lambda model: Signum(model.parameters(), lr=0.008, betas=(0.9, 0.9)))
signmuon, _ = fit(lambda model: Signum(signmuon_groups(model, lr=0.08, other_lr=0.016)))
for group in Signum(signmuon_groups(signmuon.model)).param_groups:
    print(f"{group['name']}: {', '.join(group['param_names'])}")

count = sum(parameter.numel() for parameter in voted.parameters())
sent = trainer.callback_metrics["vote/bytes_per_step"].item()
votes = {"SignMuon, vote": signmuon, "verdict momentum, vote": voted, "Signum, vote": signum}
for name, model in {"AdamW, plain DDP": adamw, **votes}.items():
    print(f"{name:22}  test accuracy {model.accuracy():.1%}")
ring = traffic.ring_all_reduce(count, 2, 32)
print(f"{count:,} parameters; bytes per step and worker: vote {sent:,.0f}, DDP {ring:,} ({ring / sent:.0f} times that)")

# %% [markdown]
# AdamW is ahead by two to five of the 450 test images: whether that is luck, only more seeds could tell, and with a
# single hidden matrix SignMuon has little to show. (The vote's bytes are counted, DDP's calculated.)
#
# ## What the vote looks like


# %%
def read(logger, name):
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]
    return zip(*rows, strict=True)


for name in ("vote/agreement/rank0", "vote/agreement/rank1", "vote/ties", "vote/flips"):
    steps, values = read(logger, name)
    plt.plot(steps, values, label=name, linestyle="--" if name.endswith("rank1") else "-")
    print(f"{name:21} first {values[0]:.2f}, last {values[-1]:.2f}")
plt.gca().set(xlabel="step", ylabel="share of coordinates", ylim=(0, 1))
plt.legend(loc="lower left", ncols=2)
plt.show()

# %% [markdown]
# Agreement: how often a rank's ballot was the verdict. Flips: how often a verdict was not that of the step before. Why
# so many ties, and why is rank 0 so often right? Count the gradient entries that are exactly zero in a batch.

# %%
batch = slice(450, 514)
nn.functional.cross_entropy(voted.model(images[batch]), labels[batch]).backward()
gradient = torch.cat([parameter.grad.flatten() for parameter in voted.parameters()])
print(f"{(gradient == 0).float().mean():.0%} of the gradient is exactly 0")

# %% [markdown]
# Blank pixels and idle units. Where both ranks have a zero, their alternating bits differ: a tie. It goes by the step's
# parity, as rank 0's zero did, and the other way at the next step: a flip. So nothing drifts there, but it counts among
# ties and flips. The other ties are ranks that see different signs: with two workers every disagreement is a tie. An
# odd number has none, and a better vote (see `01_majority_vote_by_hand`).
#
# ## Schedules, accumulation, parameter groups
#
# `Signum` is a torch optimizer: schedulers move its `lr`, groups have settings of their own. Accumulation adds up each
# rank's own gradients between votes, so about half as many votes and bytes do for as many epochs (of 11 batches each
# here, of which the last votes alone).


# %%
def grouped(model):
    parameters = list(model.parameters())
    weights = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01}
    biases = {"params": [p for p in parameters if p.ndim == 1], "lr": 0.005}
    return Signum([weights, biases], lr=0.02, betas=(0, 0), verdict_momentum=0.8)


half = CSVLogger(folder.name, name="half", version=0)
callbacks = [VoteMonitor(), LearningRateMonitor("step")]
model, _ = fit(grouped, callbacks=callbacks, logger=half, log_every_n_steps=1, accumulate_grad_batches=2)
for name, run in (("every batch", logger), ("every other batch", half)):
    steps, values = read(run, "vote/bytes_per_step")
    print(f"vote at {name:17} {len(steps)} votes, {sum(values):,.0f} bytes in all")
for group in ("pg1", "pg2"):
    _, values = read(half, f"lr-Signum/{group}")
    print(f"lr of group {group}: from {values[0]:.4f} to {values[-1]:.4f}")
print(f"accuracy {model.accuracy():.1%}")

# %% [markdown]
# ## Checkpoints
#
# Every rank has its own momentum, and a Lightning checkpoint under `"majority_vote"` holds them all, in one file; with
# `betas=(0, 0)` no rank has a state of its own, and it is an ordinary one. It also opens on another number of ranks. We
# train for two epochs, start again from the checkpoint of the first, and compare the parameters bit by bit.

# %%
kinds = {
    "verdict momentum": lambda model: Signum(model.parameters(), 0.02, (0, 0), verdict_momentum=0.8),
    "Signum": lambda model: Signum(model.parameters(), lr=0.008, betas=(0.9, 0.9)),
}
for k, (name, optimizer) in enumerate(kinds.items()):
    save = ModelCheckpoint(Path(folder.name, str(k)), filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    straight, _ = fit(optimizer, epochs=2, cosine=False, callbacks=[save])
    resumed, _ = fit(optimizer, epochs=2, cosine=False, resume=Path(folder.name, str(k), "epoch=0.ckpt"))
    same = all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters(), strict=True))
    print(f"{name:17} resumed equals uninterrupted: {same}")

# %% [markdown]
# ## What is refused
#
# What cannot work raises an error before the first step. Worker processes raise it, so we print the last line.


# %%
def refused(function):
    try:
        function()
    except Exception as error:
        print(f"- {str(error).strip().splitlines()[-1]}")


refused(lambda: fit(lambda model: torch.optim.AdamW(model.parameters())))
refused(lambda: fit(lambda model: Signum(model.parameters(), lr=0.01 / (1 + dist.get_rank()))))
refused(lambda: fit(lambda model: Signum(model.parameters(), zeros="ignore")))
refused(lambda: MajorityVoteStrategy(ddp_comm_state=object()))
refused(lambda: fit(lambda model: Signum(model.parameters()), "auto", devices=1, callbacks=[VoteMonitor()]))

# %% [markdown]
# ## What to use when
#
# - **SignMuon**, `Signum(signmuon_groups(model))`, on transformers and convolutional networks.
# - **Verdict momentum**, `betas=(0, 0), verdict_momentum=0.8`, where a model has no hidden matrices. No worker has a
#   state of its own then.
# - **Signum**, the default `betas=(0.9, 0.9)`: the papers' method, and a simple baseline.
# - **Plain DDP**, where the links are fast, or accuracy per step is all that counts.
#
# What this rests on is in `benchmarks/papers`: small models, most of them early in training. Both momenta at once never
# beat the better one. Learning rates: `05_choosing_lr_and_betas`.

# %%
folder.cleanup()
