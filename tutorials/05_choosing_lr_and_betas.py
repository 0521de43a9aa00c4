# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Choosing lr and betas
#
# You have settings for AdamW or SGD that work. What are Signum's?
#
# A transformer or a convolutional net has hidden matrices and kernels, and they had better vote by their polar factors,
# as under "Matrices" below. What comes first is for all else, and for models without them.
#
# With signs the learning rate is a length: every weight moves by exactly `lr` at each step. AdamW moves a weight by
# `lr` times `m/√v`, which is 1 where all gradients agree and near 0 where they are noise, so on the whole by less.
# Hence a smaller `lr` for Signum, and one more like AdamW's for verdict momentum, whose mean of verdicts is near 0
# where the workers see noise, too. SGD moves by `lr` times the gradient; multiply by its mean size to compare.
#
# Weight decay is decoupled, as in AdamW: `x ← x − lr·(u + λ·x)`. What it does over a run goes by `lr·λ`, so with a
# fifth of the learning rate take five times the decay.

# %%
import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

from signsgd_core import Reference, warmup_steps
from signsgd_lightning import Signum

torch.set_num_threads(1)
plt.rcParams.update({"figure.dpi": 80, "figure.figsize": (6.5, 3.5), "figure.constrained_layout.use": True})

images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
images, labels = images[order].float() / 16, labels[order]


def train(optimizer, seed, steps=250, batch=64):
    """Return the loss on 450 digits that were not trained on, and the mean size of a gradient's entry."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer, sizes = optimizer(model.parameters()), []
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        at = torch.randint(450, len(images), (batch,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[at]), labels[at]).backward()
        sizes.append(np.mean([p.grad.abs().mean().item() for p in model.parameters()]))
        optimizer.step()
        cosine.step()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(images[:450]), labels[:450]).item(), np.mean(sizes)


# %% [markdown]
# ## A grid, measured
#
# One worker, a perceptron on the digits of scikit-learn, the mean of three seeds, every learning rate twice the last.

# %%
METHODS = {
    "SGD, momentum 0.9": lambda lr: lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "AdamW": lambda lr: lambda p: torch.optim.AdamW(p, lr=lr),
    "Signum (0.9, 0.9)": lambda lr: lambda p: Signum(p, lr=lr),
    "Lion (0.9, 0.99)": lambda lr: lambda p: Signum(p, lr=lr, betas=(0.9, 0.99)),
    "verdict momentum 0.8": lambda lr: lambda p: Signum(p, lr=lr, betas=(0, 0), verdict_momentum=0.8),
}
rates = {name: 2.0 ** np.arange(-12, -2) for name in METHODS} | {"SGD, momentum 0.9": 2.0 ** np.arange(-7, 2)}
best, size = {}, 0.0
for name, optimizer in METHODS.items():
    runs = np.array([[train(optimizer(lr), seed) for seed in range(3)] for lr in rates[name]]).mean(1)
    losses = runs[:, 0]
    best[name] = rates[name][np.argmin(losses)]
    if name.startswith("SGD"):
        size = runs[np.argmin(losses), 1]
    plt.plot(rates[name], losses, marker=".", label=name)
    near = [f"{lr:.2g}" for lr, loss in zip(rates[name], losses, strict=True) if loss < 2 * losses.min()]
    print(f"{name:21} best lr {best[name]:<8.2g} loss {losses.min():.3f}; below twice that: {', '.join(near)}")
plt.gca().set(xscale="log", yscale="log", xlabel="lr", ylabel="test loss", ylim=(None, 1))
plt.legend()
plt.show()

# %% [markdown]
# Signs need a tuned learning rate as others do. Beside AdamW's and SGD's the best ones are:

# %%
for name in ("Signum (0.9, 0.9)", "Lion (0.9, 0.99)", "verdict momentum 0.8"):
    print(f"{name:21} best lr / AdamW's {best[name] / best['AdamW']:g}")
moved = best["SGD, momentum 0.9"] / (1 - 0.9) * size
print(f"SGD's lr / (1 − momentum) x mean gradient: {moved:.5f}, beside Signum's {best['Signum (0.9, 0.9)']:.5f}")

# %% [markdown]
# Other grids, of votes of four workers (`benchmarks/papers`) and of two (`02_lightning`), for AdamW, Signum and verdict
# momentum: a small GPT over bytes 0.002, 0.0002, 0.004; a small ResNet on CIFAR-10 0.0025, 0.001, 0.004; the digits of
# `02_lightning` 0.04, 0.008, 0.02. There are two kinds, and a reason for it.
#
# ## Why these factors
#
# Where noise dominates, AdamW moves a weight by `lr·g/σ` on the whole, for `√v` is the noise's size then. And a vote?
# Let `S = |g|/σ` be 0.05, were the batches of all workers one, and watch how far it moves:


# %%
def drift(workers, steps=100, weights=20_000, snr=0.05, **settings):
    """Return how far a vote moves a weight, beside `lr·g/σ`."""
    source = np.random.default_rng(0)
    reference = Reference([np.zeros(weights, np.float32)], workers, lr=1.0, **settings)
    for _ in range(steps):
        gradients = source.normal(snr / workers**0.5, 1.0, (workers, 1, weights)).astype(np.float32)
        reference.step(list(gradients))
    return -reference.parameters[0].mean() / steps / snr


for workers in (1, 3, 4, 8):
    signum, verdict = drift(workers), drift(workers, betas=(0, 0), verdict_momentum=0.8)
    print(f"{workers} workers: Signum {signum:.1f}, verdict momentum {verdict:.2f}")

# %% [markdown]
# Verdict momentum moves by 0.6 to 0.8 of it, so it needs up to 1.7 times AdamW's learning rate; Signum, whose momentum
# has lifted `S` before the vote, moves two to three times as far, so it needs a third. That is what the GPT and the
# ResNet need, more or less, whose gradients stay noisy to the end. The digits are learnt to the end: their gradients
# fade, and AdamW's steps with them, since its `√v` remembers larger ones for a thousand steps. Signs do not fade, and
# so need a smaller learning rate. (The last two sentences are our reading; they were not measured apart.)
#
# | from AdamW's settings | to `Signum`, the papers' | to verdict momentum, `betas=(0, 0), verdict_momentum=0.8` |
# |---|---|---|
# | `lr`, where the loss stays far from 0: text, many images | a fifth (measured: 0.1 and 0.4) | twice (1.6 and 2) |
# | `lr`, where the data is learnt to the end | an eighth (measured: 0.12 and 0.2) | a third (0.25 and 0.5) |
# | `weight_decay` | such that `lr·weight_decay` stays | the same |
#
# And SGD's `lr` with momentum `μ` was, once and above, twice Signum's when multiplied by `1/(1 − μ)` and by the mean
# size of a gradient's entry. Try twice and half of all these.
#
# ## Matrices
#
# `Signum(signmuon_groups(model, lr=0.08, other_lr=0.001))` votes on every hidden matrix and kernel by the signs of its
# momentum's polar factor, with `betas=(0.9, 0.95)`, and on all else by those of the momentum. Four workers, three seeds
# (`benchmarks/papers`, which has other rates that are as good):
#
# | | GPT, 0.64 M, 500 steps: loss | `lr`, `other_lr` | ResNet-8, one epoch: accuracy | `lr`, `other_lr` |
# |---|---|---|---|---|
# | **SignMuon**, vote | **1.84** | 0.08, 0.001 | **63.8%** | 0.08, 0.004 |
# | Muon, fp32, clipped | **1.84** | 0.04, 0.0025 | 63.5% | 0.08, 0.005 |
# | AdamW, fp32, clipped, the better β2 | 2.16 | 0.002 | 53.7% | 0.005 |
# | verdict momentum, vote | 2.25 | 0.004 | 52.4% | 0.004 |
#
# The factors above are not for matrices. There `lr` is not what a weight moves by: that is `lr/√fan_in`, on the whole
# as far as Muon moves it. At 0.08 and 128 columns, as most of the GPT's matrices have, it is 0.007, 3.5 times AdamW's.
# Begin with Muon's `lr` or twice that, and for the rest with half of AdamW's (measured: 0.5 and 0.8).
#
# It costs arithmetic, once a step, whatever the batch: a polar factor is fifteen products of matrices. With small
# batches that is more than the backward pass (`benchmarks/results/muon_step.txt`). A model without hidden matrices
# gains nothing by it, and the perceptron above, which has one, little (`02_lightning`).
#
# ## betas
#
# A worker's momentum turns many noisy signs into a better one. It helps until it remembers a gradient that is no longer
# true. `GeometryMonitor` says from the signal-to-noise which β lifts it over `2/√3`
# (`04_will_signs_work_for_my_model`). `betas=(0.9, 0.9)` is the papers'; `(0.9, 0.99)` is Lion.
#
# A momentum needs some steps before it is the mean of many gradients. `warmup_steps="auto"` votes by the gradient until
# then, for as many steps as Theorem 3 of the first paper asks for:

# %%
for beta in (0.5, 0.8, 0.9, 0.95, 0.99):
    print(f"beta {beta:4}: {warmup_steps(beta):3} steps")

# %% [markdown]
# Whether it pays is another matter. Measured (`benchmarks/papers/README.md`), it helped in the first steps of a noisy
# quadratic, hurt in those of digits with four workers, and at the end of a run made no difference in seven cases of
# eight. It is off unless you ask for it.
