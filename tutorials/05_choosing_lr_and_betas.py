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
# With signs the learning rate is a length: every weight moves by exactly `lr` at each step. AdamW moves a weight by
# `lr` times `m/√v`, which is 1 where all gradients agree and near 0 where they are noise, so on the whole by less.
# Hence a smaller `lr` for Signum, and one more like AdamW's for verdict momentum, whose mean of verdicts is near 0
# where the workers see noise, too. SGD moves by `lr` times the gradient; multiply by its mean size to compare.
#
# Weight decay is decoupled, as in AdamW: `x ← x − lr·(u + λ·x)`. What it does over a run goes by `lr·λ`, so with an
# eighth of the learning rate take eight times the decay.

# %%
import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import nn

from signsgd_core import warmup_steps
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
# Signs want their learning rate as much as others do. Beside AdamW's and SGD's the best ones are:

# %%
for name in ("Signum (0.9, 0.9)", "Lion (0.9, 0.99)", "verdict momentum 0.8"):
    print(f"{name:21} best lr / AdamW's {best[name] / best['AdamW']:g}")
moved = best["SGD, momentum 0.9"] / (1 - 0.9) * size
print(f"SGD's lr / (1 − momentum) x mean gradient: {moved:.5f}, beside Signum's {best['Signum (0.9, 0.9)']:.5f}")

# %% [markdown]
# On a small GPT a grid with a vote of four workers gave AdamW 0.002, Signum 0.0002 and verdict momentum 0.004
# (`benchmarks/papers`), and in `02_lightning` two workers AdamW 0.04, Signum 0.008 and verdict momentum 0.02. So:
#
# | from | to `Signum`, the papers' | to verdict momentum, `betas=(0, 0), verdict_momentum=0.8` |
# |---|---|---|
# | AdamW's `lr` | an eighth (measured: a tenth to a fifth) | a half (measured: a quarter to twice) |
# | AdamW's `weight_decay` | eight times | twice |
# | SGD's `lr` with momentum `μ` | half of `lr/(1 − μ)` times the mean size of a gradient's entry | all of that |
#
# The last line was measured once, above. Try twice and half of each.
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
