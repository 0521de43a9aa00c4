# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Will signs work for my model?
#
# Signs give every coordinate the same step. That is good where the noise sits in few coordinates, which then have no
# more influence than the others, and bad where the gradient sits in few and the rest is noise, which then gets a vote
# each.
# The first paper says it in numbers: with the density `φ(v) = ‖v‖₁²/(d·‖v‖₂²)`, signs need `R2 = φ(σ)/φ(g)` and
# `R1 = √φ(L)/φ(g)` small, `g` the gradient, `σ` its noise and `L` the curvature.
#
# `GeometryMonitor` measures them while a model trains, with any optimizer, and says what follows. Here are two models,
# one of each kind, and then both are trained both ways, to see whether it was right.

# %%
import logging
import os
import warnings
from tempfile import TemporaryDirectory

os.environ["KERAS_BACKEND"] = "torch"  # any backend would do

import keras
import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib import pyplot as plt
from sklearn.datasets import load_breast_cancer
from torch import nn

import signsgd_keras
from signsgd_core.analysis import advice
from signsgd_lightning import GeometryMonitor, Signum

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
plt.rcParams.update({"figure.dpi": 80, "figure.figsize": (6.5, 3.2), "figure.constrained_layout.use": True})
folder = TemporaryDirectory()

# %% [markdown]
# ## Two data sets
#
# Breast cancer, as scikit-learn ships it: 569 patients, 30 measurements, malignant or not. In the first copy a 31st
# instrument is broken: it shows 0, but once in twenty times a number in the hundreds. In the second there are four good
# measurements among a thousand that have nothing to do with it. A logistic regression for both.

# %%
x, labels = load_breast_cancer(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, labels = ((x - x.mean(0)) / x.std(0))[order], labels[order].astype(np.float32)
TEST = 169  # the first patients are kept aside


def broken_instrument(x, source):
    shown = np.where(source.random((len(x), 1)) < 0.05, source.normal(0, 300, (len(x), 1)), 0)
    return np.hstack([x, shown]).astype(np.float32)


def many_instruments(x, source):
    return np.hstack([3 * x[:, 20:24], source.normal(size=(len(x), 1000))]).astype(np.float32)


class Regression(LightningModule):
    def __init__(self, instruments, optimizer, steps=300, seed=0):
        super().__init__()
        self.instruments, self.optimizer, self.steps = instruments, optimizer, steps
        self.source = np.random.default_rng(seed)
        self.model = nn.LazyLinear(1)
        self.loss(slice(0, 1))  # now it knows how many instruments there are
        nn.init.zeros_(self.model.weight), nn.init.zeros_(self.model.bias)

    def loss(self, patients):
        inputs = torch.from_numpy(self.instruments(x[patients], self.source))
        targets = torch.from_numpy(labels[patients])
        return nn.functional.binary_cross_entropy_with_logits(self.model(inputs).squeeze(1), targets)

    def training_step(self, batch, index):
        return self.loss(self.source.integers(TEST, len(x), 32))

    def configure_optimizers(self):
        return self.optimizer(self.parameters())

    def train_dataloader(self):
        return range(self.steps)


def fit(model, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", max_epochs=1, default_root_dir=folder.name, **quiet, **options).fit(model)
    return model


# %% [markdown]
# ## What the monitor says
#
# A short run with any optimizer will do, here plain SGD with a small learning rate. `curvature_loss` is for `R1`;
# without it the monitor goes by `R2` alone. At the end it writes `geometry.json` and a plot into the run's folder and
# logs its advice; `python -m signsgd_core.analysis.advice geometry.json` prints it again.


# %%
def cautious(parameters):
    return torch.optim.SGD(parameters, lr=1e-5)


for instruments in (broken_instrument, many_instruments):
    monitor = GeometryMonitor(curvature_loss=lambda module: module.loss(slice(TEST, None)), directory="geometry")
    fit(Regression(instruments, cautious, steps=200), callbacks=[monitor])
    print(f"{instruments.__name__}, {monitor.report.parameters:,} parameters:")
    print("\n".join(advice.advise(monitor.report.records, workers=1)), end="\n\n")

# %% [markdown]
# The broken instrument's weight has nearly all of the noise and little of the gradient: signs. With a thousand useless
# instruments the noise is everywhere and the gradient in four weights: gradients. Signal-to-noise, `S = |g|/σ`, says
# how many workers are worth their while: where it is high one sign is as good as a thousand votes.
#
# ## Both ways
#
# Each with the best of several learning rates, the mean of three seeds.

# %%
METHODS = {
    "SGD": (lambda lr: lambda parameters: torch.optim.SGD(parameters, lr=lr), (0.004, 0.012, 0.04, 0.12, 0.36)),
    "signSGD": (
        lambda lr: lambda parameters: Signum(parameters, lr=lr, betas=(0, 0)),
        (0.0004, 0.0013, 0.004, 0.012, 0.04),
    ),
}
for instruments in (broken_instrument, many_instruments):
    for name, (optimizer, rates) in METHODS.items():
        losses = []
        for lr in rates:
            runs = [fit(Regression(instruments, optimizer(lr), seed=seed)) for seed in range(3)]
            with torch.no_grad():
                losses.append(np.mean([run.loss(slice(TEST)).item() for run in runs]))
        k = int(np.argmin(losses))
        print(f"{instruments.__name__:18} {name:8} test loss {losses[k]:.3f} with lr {rates[k]}")

# %% [markdown]
# It was right both times. Two cautions. The papers' ratios compare bounds, and bounds are not the truth: where they are
# near 1 only trying tells, and the monitor says so. And a mean of few gradients is mostly noise, whose density it then
# has: `geometry/signal` is the share that is not, and below one half the monitor says that it cannot tell.
#
# ## The same in Keras
#
# The callback has the same name, settings and figures. They are in the logs of each epoch, too.

# %%
source = np.random.default_rng(0)
inputs = broken_instrument(x[TEST:], source)
model = keras.Sequential([keras.Input((31,)), keras.layers.Dense(1, kernel_initializer="zeros")])
model.compile(keras.optimizers.SGD(1e-5), keras.losses.BinaryCrossentropy(from_logits=True))
monitor = signsgd_keras.GeometryMonitor(every_n_steps=50, samples=50, directory=None)
keras.config.disable_interactive_logging()  # the advice would be printed by itself
history = model.fit(inputs, labels[TEST:, None], batch_size=32, epochs=16, verbose=0, callbacks=[monitor])
print(advice.advise(monitor.report.records, workers=1)[0])
print(f"R2 in the logs of the last epoch: {history.history['geometry/noise_ratio'][-1]:.2f}")

# %% [markdown]
# Through training, as in the monitor's own plot:

# %%
steps = [record["step"] for record in monitor.report.records]
for name in ("gradient", "noise"):
    plt.plot(steps, [record[f"geometry/{name}_density"] for record in monitor.report.records], marker=".", label=name)
plt.gca().set(xlabel="step", ylabel="density", ylim=(0, 1))
plt.legend()
plt.show()
