# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Majority vote by hand
#
# signSGD with majority vote (arXiv 1802.04434, 1810.05291) trains one model on several workers that tell each other
# only signs. Here is every stage of it in NumPy, each claim beside its measurement.

# %%
import numpy as np
from matplotlib import pyplot as plt

from signsgd_core import Reference, adversaries, pack, planes, tally, unpack, verdict
from signsgd_core.network import costs, traffic

plt.rcParams.update({"figure.dpi": 80, "figure.figsize": (6.5, 3.2), "figure.constrained_layout.use": True})

# %% [markdown]
# ## A ballot
#
# A ballot is one bit for each parameter: 1 where the worker's direction is negative. Eight coordinates share a byte,
# and coordinate `8k + j` is bit `j` of byte `k`. `np.unpackbits` shows the bits, `unpack` the signs they stand for.

# %%
direction = np.array([-2.0, 0.3, 1e-30, -0.5, 4.0, -1.0, 7.0, 2.0, -9.0, 0.1], np.float32)
ballot = pack(direction, zeros="positive")
print("bits   ", np.unpackbits(ballot[0], count=len(direction), bitorder="little"))
print("signs  ", unpack(ballot, len(direction)).astype(int))
print(f"{direction.nbytes} bytes of float32 became a ballot of {ballot.nbytes} bytes")

# %% [markdown]
# The size of each number is gone: −9 and −0.5 cast the same vote.
#
# ## Tally and verdict, on the packed words
#
# The tally counts in every bit position how many ballots say 1, by adding whole words with `& | ^` alone. Any integers
# will do, so here are three ballots of four coordinates as plain Python integers.

# %%
ballots = [0b0011, 0b0101, 0b0110]
ones, twos = tally(ballots)
(majority,) = verdict([[ballot] for ballot in ballots], "positive", step=0)
print("ballots ", *(f"{ballot:04b}" for ballot in ballots))
print("counts  ", "".join(str(2 * (twos >> bit & 1) + (ones >> bit & 1)) for bit in (3, 2, 1, 0)))
print("verdict ", f"{majority:04b}")

# %% [markdown]
# With 64-bit words one operation serves 64 coordinates, and nothing is unpacked to be counted. Seven workers, a million
# coordinates: is the verdict on the words the verdict by counting?

# %%
random = np.random.default_rng(0)
gradients = random.standard_normal((7, 1_000_000), dtype=np.float32)
words = [pack(gradient, "positive").view(np.uint64) for gradient in gradients]
(packed,) = verdict(words, "positive", step=0)
same = np.array_equal(unpack(packed.view(np.uint8)[None], 1_000_000) < 0, (gradients < 0).sum(axis=0) > 3.5)
print(f"{packed.size:,} words of {packed.dtype}, verdict equal to counting: {same}")

# %% [markdown]
# ## Training by vote
#
# `Reference` runs M workers in one process: the library's executable specification. The problem: a quadratic in 200
# coordinates of unequal curvature. Each worker sees its gradient under noise of its own, mostly larger than it.

# %%
CURVATURE = np.logspace(-1, 0, 200)


def train(workers, steps=300, lr=0.02, betas=(0, 0), noise=1.0, decay=False, **settings):
    random = np.random.default_rng(1)
    reference = Reference([np.linspace(0.5, 1.5, 200)], workers, lr, betas, **settings)
    losses = []
    for step in range(steps):
        reference.lr = lr * (1 - step / steps) if decay else lr
        x = reference.parameters[0]
        reference.step([[CURVATURE * x + noise * random.standard_normal(200)] for _ in range(workers)])
        losses.append(0.5 * np.sum(CURVATURE * reference.parameters[0] ** 2))
    return np.array(losses)


for workers in (1, 3, 7, 15, 31):
    losses = train(workers)
    print(f"{workers:2} workers: {losses[99]:5.2f} after 100 steps, {losses[-50:].mean():5.2f} over the last 50")
    plt.semilogy(losses, label=f"M = {workers}")
plt.gca().set(xlabel="step", ylabel="loss")
plt.legend()
plt.show()

# %% [markdown]
# More workers make the verdict right more often, so the loss falls faster and settles lower. It never reaches 0, for
# each coordinate moves by `lr` at each step, however small its gradient: see the last section.
#
# ## Ties: an even number of workers
#
# With an even M a tally can tie. `zeros="alternate"` decides ties by the parity of the step, `"abstain"` lets a tied
# coordinate stand still, `"positive"` says +1. How often do ties happen, and how often is the verdict right? A true
# gradient of 0.3, noise of 1, a hundred thousand coordinates, two steps of opposite parity under `"alternate"`.

# %%
random = np.random.default_rng(2)
for workers in range(1, 9):
    gradients, right = 0.3 + random.standard_normal((workers, 100_000)), []
    for step in (0, 1):
        cast = [pack(gradient, "alternate", step, worker) for worker, gradient in enumerate(gradients)]
        right.append(unpack(np.stack(verdict(cast, "alternate", step)), 100_000) > 0)
    ties = np.mean(2 * (gradients < 0).sum(axis=0) == workers)
    print(f"{workers} workers: {ties:5.1%} ties, {np.mean(right):.1%} right")

# %% [markdown]
# Ties get rarer as M grows, but slowly. And up to sampling error an even M votes no better than M − 1: the additional
# worker at most turns a majority of one into a tie. Take an odd number of workers where you can choose.
#
# ## Zeros: a weight that nobody touches
#
# One bit cannot say "zero", yet unused embeddings and dead units have gradients of exactly zero. What happens to such a
# weight, with nothing pulling at it? 100 steps at lr = 0.01, from 0.

# %%
for zeros in ("positive", "alternate", "abstain"):
    reference, path = Reference([np.zeros(1)], workers=3, lr=0.01, betas=(0, 0), zeros=zeros), []
    for _ in range(100):
        reference.step([[np.zeros(1)]] * 3)
        path.append(reference.parameters[0][0])
    print(f"{zeros:10} ends {abs(path[-1]):.2f} from where it began, was at most {np.abs(path).max():.2f} away")

# %% [markdown]
# Under `"positive"`, as in the 2019 authors' code, the weight drifts by `lr` at every step. Under `"alternate"` it
# takes one step of `lr` and the next one back. Under `"abstain"` it stays, and a ballot takes two bits, not one.
#
# `"alternate"` has its own price. Worker `i` with a zero casts bit `(t + i) mod 2`; zeros of workers of unlike parity
# cancel out, those of like parity do not. Let workers 0, 2 and 4 see a zero while 1 and 3 both see a gradient of −1:

# %%
for zeros in ("alternate", "abstain"):
    reference, seen = Reference([np.zeros(1)], workers=5, lr=0.01, betas=(0, 0), zeros=zeros), []
    for _ in range(4):
        reference.step([[np.zeros(1)], [-np.ones(1)], [np.zeros(1)], [-np.ones(1)], [np.zeros(1)]])
        seen.append(int(reference.verdicts[0][0]))
    print(f"{zeros:10} verdicts {seen}, bits per coordinate each way: {planes(zeros)}")

# %% [markdown]
# Three who know nothing outvote two who know at every other step. Where exact zeros are many, `"abstain"` may be worth
# its second bit. (A whole parameter without a gradient, `None`, abstains under every rule.)
#
# ## Verdict momentum: the mean of verdicts has a magnitude
#
# A verdict is ±1 whatever the evidence. Its running mean `u ← γ·u + (1−γ)·V` is not: where the workers agree from step
# to step it is near ±1, where they see only noise near 0.

# %%
signal = np.repeat([0.0, 0.1, 0.3, 1.0, 3.0], 2000)
random = np.random.default_rng(3)
reference = Reference([np.zeros(10_000)], workers=3, lr=0.01, betas=(0, 0), verdict_momentum=0.9)
for _ in range(60):
    reference.step([[signal + random.standard_normal(10_000)] for _ in range(3)])
for strength in np.unique(signal):
    u = reference.verdict_momenta[0][signal == strength]
    print(f"gradient {strength:.1f}, noise 1: u = {u.mean():5.2f} ± {u.std():.2f}")
    plt.hist(u, bins=np.linspace(-1, 1, 61), histtype="step", label=f"gradient {strength:.1f}")
plt.gca().set(xlabel="verdict momentum u", ylabel="coordinates", ylim=(0, 450))
plt.legend(loc="upper left")
plt.show()

# %% [markdown]
# Does that make it train better? Three members of the family on the quadratic, with 7 workers:

# %%
family = {"signSGD": {}, "Signum 0.9": {"betas": (0.9, 0.9)}, "verdict momentum 0.8": {"verdict_momentum": 0.8}}
for name, settings in family.items():
    losses = train(7, **settings)
    print(f"{name:20} {losses[49]:6.2f} after 50 steps, {losses[-50:].mean():5.2f} over the last 50")

# %% [markdown]
# Not here. Averaging before the sign (Signum) descends much faster, for it lifts small gradients out of the noise, and
# at the same `lr` it settles higher. Averaging after the sign smooths the path and changes little else on this problem.
# On real networks either may win; `02_lightning` compares them on digits.
#
# ## Liars
#
# An inverter computes an honest gradient and sends its opposite. Each liar cancels one honest worker: 3 of 7 slow the
# vote down, 4 of 7 own it.

# %%
for liars in range(5):
    losses = train(7, adversaries=dict.fromkeys(range(liars), adversaries.invert))
    print(f"{liars} inverters of 7: from {losses[0]:.1f} after one step to {losses[-1]:.1f}")
    plt.semilogy(losses, label=f"{liars} inverters")
plt.gca().set(xlabel="step", ylabel="loss", ylim=(0.1, 2000))
plt.legend(loc="lower left", ncols=3)
plt.show()

# %%
kinds = {"randomize": adversaries.Randomize(seed=4), "silent": adversaries.silent, "send NaN": adversaries.send_nan}
for name, adversary in kinds.items():
    losses = train(7, adversaries=dict.fromkeys(range(3), adversary))
    print(f"3 of 7 {name:10} to {losses[-1]:.1f}")

# %% [markdown]
# Noise, silence and NaN do less harm than inverters. A mean of gradients would be NaN with one of the last kind.
#
# ## Bytes
#
# What a worker sends per step, in megabytes, for 25 million parameters and `M` workers.

# %%
parameters, counts = 25_000_000, (2, 4, 8, 16, 64, 256)
print(f"{'M =':24}", *(f"{workers:8}" for workers in counts))
for name, scheme in costs.SCHEMES.items():
    row = (f"{scheme.traffic(parameters, workers) / 1e6:8.1f}" for workers in counts)
    print(f"{name:24}", *row)
ring, vote = traffic.ring_all_reduce(parameters, 8, 32), traffic.majority_vote(parameters, 8)
print(f"8 workers: the vote sends {ring / vote:.2f} times less than ring all-reduce in fp32")

# %% [markdown]
# Vote and ring level off as M grows; what goes from everybody to everybody grows with M. With 64 workers it sends as
# much as the ring does in fp32, and beyond that more.
#
# ## What a vote loses
#
# First, size. Without any noise gradient descent comes to rest, and a vote does not: near the minimum every coordinate
# still moves by `lr`. A learning rate that decays is the remedy. A thousand steps:

# %%
for noise in (0, 1):
    constant, decayed = (train(7, 1000, noise=noise, decay=decay)[-1] for decay in (False, True))
    print(f"noise {noise}: loss {constant:.1e} with a constant lr, {decayed:.1e} with one that falls to zero")

# %% [markdown]
# Second, the mean. A vote follows the median of what the workers see, and where noise is skewed the median may have the
# other sign. Let each worker see +1 seven times in ten and −4 three times in ten: the mean is −0.5, most say +1.

# %%
random = np.random.default_rng(5)
print("              under symmetric noise   under skewed noise")
for workers in (1, 3, 9, 31):
    shape, row = (workers, 20_000), []
    for seen in (random.normal(-0.5, 2.3, shape), random.choice([1.0, -4.0], shape, p=[0.7, 0.3])):
        averaged, voted = seen.mean(axis=0) < 0, (seen < 0).sum(axis=0) > workers / 2
        row.append(f"mean {averaged.mean():4.0%}, vote {voted.mean():4.0%}")
    print(f"M = {workers:2}, right:", "   ".join(row))

# %% [markdown]
# Under symmetric noise the vote is right a little less often than the mean, and more often with more workers. Under
# this skewed noise it is wrong, and surer of it with every worker. The papers' theorems assume noise that is symmetric
# and unimodal; large batches come closer to it. Where workers hold different kinds of data, shuffle before you vote.
