# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Majority vote in Keras
#
# Two changed lines make a training under `tf.distribute` vote:
#
# ```diff
# +from signsgd_keras import Signum
#  …
#  strategy = tf.distribute.MirroredStrategy(devices)
#  with strategy.scope():
#      model = …
# -    model.compile(keras.optimizers.Adam(0.04), loss)
# +    model.compile(Signum(0.08, orthogonalize=True, exclude_layers=["logits"], other_lr_ratio=0.2), loss)
# ```
#
# On several machines the strategy is a `MultiWorkerMajorityVoteStrategy()`. With one replica there is nobody to vote
# with, and `Signum` is an optimizer like Keras' own. First that, then two replicas in this process, then two workers.

# %%
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")  # no banners
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"  # figures that do not depend on the machine's CPU

import keras
import numpy as np
import tensorflow as tf
from keras.optimizers.schedules import CosineDecay
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits

from signsgd_core.network import traffic
from signsgd_keras import Signum, VoteMonitor

tf.get_logger().setLevel("ERROR")
cpu, two = tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)  # this machine's CPU is CPU:0 and CPU:1 from here on
plt.rcParams.update({"figure.dpi": 80, "figure.figsize": (6.5, 3.2), "figure.constrained_layout.use": True})
folder = TemporaryDirectory()

# %% [markdown]
# ## One replica
#
# The digits of scikit-learn, a small model, and `Signum` with what an optimizer has in Keras: a schedule, weight decay
# and variables exempt from it. A `.keras` file brings it back without `custom_objects`.

# %%
images, labels = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(images))
images, labels = images[order].astype("float32") / 16, labels[order]
train, test = (images[450:], labels[450:]), (images[:450], labels[:450])
EPOCHS, BATCH = 8, 128
STEPS = EPOCHS * -(-len(train[0]) // BATCH)


def compiled(optimizer, **options):
    keras.utils.set_random_seed(0)
    hidden, logits = keras.layers.Dense(256, "relu"), keras.layers.Dense(10, name="logits")
    model = keras.Sequential([keras.Input((64,)), hidden, logits])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model


def train_on(model, **options):
    return model.fit(*train, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0, **options)


def accuracy(model):
    return np.mean(np.argmax(model(test[0]), axis=1) == test[1])


alone = Signum(CosineDecay(0.004, STEPS), weight_decay=0.01)
alone.exclude_from_weight_decay(var_names=["bias"])
model = compiled(alone)
train_on(model)
model.save(Path(folder.name, "alone.keras"))
again = keras.saving.load_model(Path(folder.name, "alone.keras"))
print(f"one replica, test accuracy {accuracy(model):.1%}; read from a file {accuracy(again):.1%}")
print(f"its optimizer: {type(again.optimizer).__name__}, step {int(again.optimizer.iterations)} of {STEPS}")

# %% [markdown]
# All of this is the same with the JAX and torch backends. What follows needs TensorFlow, for `tf.distribute`.
#
# ## Several replicas on one machine
#
# Adam, whose gradients are averaged, and three votes: SignMuon, verdict momentum, and the papers' Signum, each on two
# replicas, from the same weights, over the same batches, of which every replica takes half. SignMuon votes on hidden
# matrices by the signs of their polar factors; like `keras.optimizers.Muon` it is told which layer is the output. The
# learning rates are the best of a small grid (factors of two) that we tried beforehand, with this seed and on these
# test images. The vote with verdict momentum also gets a `VoteMonitor`, **first** among the callbacks, so that those
# behind it (`CSVLogger`, `TensorBoard`, Keras' history) see its figures.

# %%
devices = ["CPU:0", "CPU:1"]
strategy = tf.distribute.MirroredStrategy(devices)


def fit(optimizer, callbacks=(), **options):
    with strategy.scope():
        model = compiled(optimizer(), **options)
    return model, train_on(model, callbacks=list(callbacks))


def by_verdict_momentum():
    return Signum(CosineDecay(0.01, STEPS), beta_1=0.0, beta_2=0.0, verdict_momentum=0.8)


def by_signmuon():
    return Signum(CosineDecay(0.08, STEPS), orthogonalize=True, exclude_layers=["logits"], other_lr_ratio=0.2)


save = keras.callbacks.ModelCheckpoint(Path(folder.name, "{epoch}.keras"))
adam, _ = fit(lambda: keras.optimizers.Adam(CosineDecay(0.04, STEPS)))
voted, history = fit(by_verdict_momentum, callbacks=[VoteMonitor()])
signum, _ = fit(lambda: Signum(CosineDecay(0.016, STEPS)), callbacks=[save])
signmuon, _ = fit(by_signmuon)
votes = {"SignMuon, vote": signmuon, "verdict momentum, vote": voted, "Signum, vote": signum}
for name, model in {"Adam, plain": adam, **votes}.items():
    print(f"{name:22}  test accuracy {accuracy(model):.1%}")
count = voted.count_params()
vote, ring = traffic.majority_vote(count, 2), traffic.ring_all_reduce(count, 2, 32)
print(f"{count:,} parameters; bytes per step and worker: vote {vote:,}, fp32 {ring:,} ({ring / vote:.0f} times that)")

# %% [markdown]
# Adam is ahead by a few of the 450 test images: whether that is luck, only more seeds could tell, and with a single
# hidden matrix SignMuon has little to show. (No byte leaves the process here: the figures are by formula, of what two
# machines would send.)
#
# ## What the vote looks like

# %%
for name in ("vote/agreement/rank0", "vote/agreement/rank1", "vote/ties", "vote/flips"):
    values = history.history[name]
    epochs = range(1, len(values) + 1)
    plt.plot(epochs, values, label=name, linestyle="--" if name.endswith("rank1") else "-")
    print(f"{name:21} first {values[0]:.2f}, last {values[-1]:.2f}")
plt.gca().set(xlabel="epoch", ylabel="share of coordinates", ylim=(0, 1))
plt.legend(loc="lower left", ncols=2)
plt.show()

# %% [markdown]
# Agreement: how often a replica's ballot was the verdict. Flips: how often a verdict was not that of the step before.
# With two replicas every disagreement is a tie, and so is every gradient entry that is exactly zero on both (blank
# pixels, idle units), where the tie goes by the step's parity, as rank 0's zero did. `02_lightning` counts the zeros.
#
# ## Every replica has a momentum of its own
#
# Signum's momentum is where the replicas differ; their parameters never do.


# %%
def copies(variable):
    return [copy.numpy() for copy in strategy.experimental_local_results(variable.value)]


momenta = [v for v in signum.optimizer.variables if v.path.endswith("_momentum")]
differ = all(not np.array_equal(*copies(v)) for v in momenta)
print(f"momenta of the replicas differ: {differ}")
print(f"parameters bit-identical: {all(np.array_equal(*copies(v)) for v in signum.trainable_variables)}")

# %% [markdown]
# A checkpoint keeps both, not their mean. `ModelCheckpoint` saved Signum's training after every epoch; we read the
# model as it was after the sixth, train it for the other two, and compare with the training that went through.

# %%
with strategy.scope():
    resumed = keras.saving.load_model(Path(folder.name, "6.keras"))
train_on(resumed, initial_epoch=6)
same = all(map(np.array_equal, signum.get_weights(), resumed.get_weights()))
print(f"resumed equals uninterrupted: {same}")

# %% [markdown]
# (A checkpoint fits another number of replicas, too: with more, the new ones take the momentum of an old one, with
# fewer, the mean of those they replace.)
#
# ## Several workers
#
# Each worker is a process that runs the same program; `TF_CONFIG` tells it where all of them are and which one it is.
# `multi_worker_keras.py`, beside this file, is such a program, with the strategy, `compile` and `fit` as above. Keras
# deals every batch out to the workers.

# %%
here = Path(__file__).parent if "__file__" in globals() else Path()
program = [sys.executable, here / "multi_worker_keras.py"]
with socket.socket() as one, socket.socket() as other:
    one.bind(("127.0.0.1", 0))
    other.bind(("127.0.0.1", 0))
    workers = [f"127.0.0.1:{port.getsockname()[1]}" for port in (one, other)]  # two that are free
processes = []
for index in range(2):
    configuration = json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}})
    environment = {**os.environ, "TF_CONFIG": configuration}
    processes.append(subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, text=True))
for process in processes:
    print(process.communicate()[0], end="")
assert all(process.returncode == 0 for process in processes)

# %% [markdown]
# The bytes are counted at the sockets, with TensorFlow's headers and what it sends beside the votes; the larger a
# model, the less these matter. As with every `MultiWorkerMirroredStrategy`, all workers save, each under a path of its
# own, and if one is lost the others end with an error.
#
# ## What is refused
#
# What cannot work ends with a sentence. Several workers also cannot have `steps_per_execution` above 1, since
# TensorFlow's collectives fail in it, whatever the optimizer. (Replicas of one process can.)


# %%
def refused(function):
    try:
        function()
    except Exception as error:
        print(f"- {str(error).strip().splitlines()[-1]}")


outside = Signum()
refused(lambda: fit(Signum, jit_compile=True))
refused(lambda: fit(lambda: outside))
refused(lambda: train_on(compiled(Signum()), callbacks=[VoteMonitor()]))
refused(lambda: Signum(beta_1=1.2))

# %% [markdown]
# ## What to use when
#
# - **SignMuon**, `orthogonalize=True`, on transformers and convolutional networks.
# - **Verdict momentum**, `beta_1=0.0, beta_2=0.0, verdict_momentum=0.8`, where a model has no hidden matrices. No
#   worker has a state of its own then.
# - **Signum**, the default `beta_1=0.9, beta_2=0.9`, where little data is learnt to the end, as the digits above.
# - **Plain `tf.distribute`**, where the links are fast, or accuracy per step is all that counts. On one machine nothing
#   crosses a wire, and a vote is for trying out what several would do.
#
# Start from Adam's learning rate and go down. Above the grids were flat: with 0.01 to 0.08 for verdict momentum and
# 0.004 to 0.032 for Signum all stayed within seven test images of Adam's best; `02_lightning` and its smaller steps
# were less forgiving.
#
# What this rests on is in `benchmarks/papers`: small models, the beginnings of trainings. Both momenta at once never
# beat the better one. More on learning rates: `05_choosing_lr_and_betas`.

# %%
folder.cleanup()
