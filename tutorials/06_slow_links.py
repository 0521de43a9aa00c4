# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Slow links: a vote every few steps
#
# Between sites even one bit a parameter and step can be too much. With *local steps* every worker takes `H` steps of
# its own, by any optimizer, and then all vote on where they went. In Lightning that is one line:
#
# ```diff
# +import signsgd_lightning
#  …
# -trainer = Trainer(devices=2, strategy="ddp")
# +trainer = Trainer(devices=2, strategy=signsgd_lightning.LocalVoteStrategy(sync_every=16))
# ```
#
# and in plain torch, without `DistributedDataParallel`:
#
# ```diff
# +from signsgd_lightning import enable_local_steps
#  …
# -model = DistributedDataParallel(model)
#  optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
# +local = enable_local_steps(model, optimizer, sync_every=16)
#  …                    # the training loop stays as it is
# +local.close_round()  # on every worker, before the model is evaluated or saved
# ```

# %%
import logging
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from signsgd_core import LocalReference
from signsgd_core.network import traffic
from signsgd_lightning import LocalVoteStrategy, VoteMonitor, enable_local_steps

torch.set_num_threads(1)  # processes with running OpenMP threads are not safe to fork
for name in ("lightning.pytorch", "lightning.fabric", "torch.multiprocessing.spawn"):
    logging.getLogger(name).setLevel(logging.ERROR)  # no banners
warnings.filterwarnings("ignore")
plt.rcParams.update({"figure.dpi": 80, "figure.figsize": (6.5, 3.2), "figure.constrained_layout.use": True})
folder = TemporaryDirectory()

# %% [markdown]
# ## One round by hand
#
# Three workers start from the same two parameters and end at three places. Each sends the *signs* of its displacement,
# one bit a parameter, and one number a tensor: its mean magnitude. The majority says where to, the median how far.

# %%
start = np.array([1.0, 1.0])
ends = [np.array([0.0, 0.5]), np.array([0.5, 1.75]), np.array([1.25, 0.5])]
reference = LocalReference([start], workers=3)
reference.close([[end] for end in ends])
for worker, end in enumerate(ends):
    displacement = start - end
    print(f"worker {worker}: displacement {displacement}, magnitude {abs(displacement).mean()}")
print(f"magnitude {reference.magnitudes[0]}, verdict {reference.verdicts[0]}: all go on from {reference.parameters[0]}")

# %% [markdown]
# ## Fewer and fewer bytes
#
# The digits of scikit-learn on two processes: AdamW over plain DDP, and AdamW as the inner optimizer of votes every 4,
# 11 and 44 steps. `VoteMonitor` logs each round: how far the workers drifted apart, and what they sent.

# %%
images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order].float() / 16, labels[order]
train_set = TensorDataset(images[450:], labels[450:])


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.005)

    def accuracy(self):
        return (self.model(images[:450]).argmax(1) == labels[:450]).float().mean().item()


def fit(strategy, epochs=8, resume=None, **options):
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    place = {"accelerator": "cpu", "devices": 2, "default_root_dir": folder.name}
    model, trainer = Digits(), Trainer(**{**quiet, **place, "strategy": strategy, "max_epochs": epochs, **options})
    trainer.fit(model, DataLoader(train_set, batch_size=64, shuffle=True), ckpt_path=resume)
    return model, trainer


def local(sync_every, **options):
    return LocalVoteStrategy(sync_every, start_method="fork", **options)


count, steps = sum(p.numel() for p in Digits().parameters()), 8 * 11
bytes_sent = {"AdamW, plain DDP": steps * traffic.ring_all_reduce(count, 2, bits=32)}
accuracy, drift = {"AdamW, plain DDP": fit("ddp_notebook")[0].accuracy()}, {}
for sync_every in (4, 11, 44):
    watch = {"callbacks": [VoteMonitor()], "log_every_n_steps": sync_every}
    logger = CSVLogger(folder.name, name=f"every {sync_every}", version=0)
    model, trainer = fit(local(sync_every), logger=logger, **watch)
    name = f"a vote every {sync_every} steps"
    bytes_sent[name] = steps / sync_every * trainer.callback_metrics["vote/bytes_per_round"].item()
    accuracy[name], drift[sync_every] = model.accuracy(), trainer.callback_metrics["vote/drift"].item()
for name, sent in bytes_sent.items():
    print(f"{name:24} test accuracy {accuracy[name]:.1%}, {sent / 1000:10,.1f} kB sent by each worker")

# %%
figure, (left, right) = plt.subplots(1, 2)
left.semilogx(list(bytes_sent.values()), list(accuracy.values()), "o-")
left.set(xlabel="bytes sent by a worker", ylabel="test accuracy")
right.loglog(list(drift), list(drift.values()), "o-")
right.set(xlabel="steps between votes", ylabel="drift when a round closes")
plt.show()

# %% [markdown]
# ## What is saved, and what goes on
#
# Validation, a checkpoint and the end of `fit` close the round first, so all workers measure and save the same model. A
# checkpoint has every worker's optimizer state. With another number of workers it still opens.

# %%
save = {"callbacks": [ModelCheckpoint(folder.name, filename="{epoch}")], "enable_checkpointing": True}
fit(local(4), epochs=2, **save)
path = str(Path(folder.name) / "epoch=1.ckpt")
state = torch.load(path, weights_only=True)["optimizer_states"][0]
others = state["inner_states_of_other_workers"]
print(f"saved after {state['local_steps']['rounds']} rounds, with {1 + len(others)} workers' states")
model, _ = fit(local(4), epochs=4, resume=path, devices=3)
print(f"two epochs more on three workers: test accuracy {model.accuracy():.1%}")

# %% [markdown]
# ## A mistake on purpose
#
# Settings out of range are named before anything starts.

# %%
net = nn.Linear(2, 1)
try:
    enable_local_steps(net, torch.optim.AdamW(net.parameters()), sync_every=0)
except ValueError as error:
    print(f"ValueError: {error}")

# %% [markdown]
# ## Which `sync_every`?
#
# Take the smallest with which the exchange no longer counts: with steps of 0.1 s and a vote of 0.8 s, `H = 16` makes a
# step 1.5 times as long, `H = 64` 1.1 times. The longer the round, the further workers drift apart, and the less the
# majority knows: the loss at the same number of steps rises with `H`. The guide's page on slow links has figures.
