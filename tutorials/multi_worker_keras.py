"""Digits by majority vote in Keras, once per worker: TF_CONFIG='{…}' python tutorials/multi_worker_keras.py"""

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

from signsgd_core.network.traffic import ring_all_reduce, sent_since, socket_bytes
from signsgd_keras import MultiWorkerMajorityVoteStrategy, Signum

EPOCHS, BATCH = 6, 128  # of all workers together; Keras hands each its share
strategy = MultiWorkerMajorityVoteStrategy()  # before anything else of TensorFlow; TF_CONFIG names the workers
chief, workers = strategy.cluster_resolver.task_id == 0, strategy.num_replicas_in_sync
keras.utils.set_random_seed(0)  # the same order on all, so that their shares do not overlap
x, y = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(x))
x, y = x[order].astype("float32") / 16, y[order]
steps = -(-len(x[450:]) // BATCH)  # of an epoch
with strategy.scope():
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(1024, "relu"), keras.layers.Dense(10)])
    schedule = keras.optimizers.schedules.PolynomialDecay(8e-3, EPOCHS * steps, 0.0)
    optimizer = Signum(schedule, beta_1=0.0, beta_2=0.0, verdict_momentum=0.8)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.fit(x[450:], y[450:], batch_size=BATCH, epochs=1, verbose=0)
before = socket_bytes()  # by now all have the first one's weights
model.fit(x[450:], y[450:], batch_size=BATCH, initial_epoch=1, epochs=EPOCHS, verbose=0)
sent = sent_since(before) / (EPOCHS - 1) / steps
flat = np.concatenate([weights.ravel() for weights in model.get_weights()])
everyone = strategy.gather(tf.constant(flat[None]), axis=0).numpy()
if chief:
    right = np.argmax(model(x[:450]), axis=1) == y[:450]
    print(f"test accuracy {np.mean(right):.3f} after {EPOCHS} epochs of {steps} steps")
    print(f"{sent:,.0f} bytes sent per step; fp32 sends {ring_all_reduce(len(flat), workers, 32):,}")
    print(f"parameters bit-identical on all {workers} workers: {bool((everyone == flat).all())}")
