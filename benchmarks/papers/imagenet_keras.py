"""ResNet-50 on any folder of images by majority vote, with the first paper's schedule, in Keras.

python -m benchmarks.papers.imagenet_keras DIR --replicas 4 [--resume]

DIR holds ``train/CLASS/*`` and ``val/CLASS/*``. Ninety epochs; the learning rate falls to a tenth after a third and
after two thirds of them. `--resume` goes on from the last whole epoch, whose state is in --out. The replicas are GPUs
where there are any, else parts of the processor; on several machines, each with its `TF_CONFIG`, all workers vote.
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import tensorflow as tf

from signsgd_keras import MajorityVote, MultiWorkerMajorityVoteStrategy, Signum, VoteMonitor


def strategy_of(replicas: int) -> Any:
    """Return several workers' strategy under `TF_CONFIG`, else one of so many replicas here."""
    if "TF_CONFIG" in os.environ:
        return MultiWorkerMajorityVoteStrategy()
    if not tf.config.list_physical_devices("GPU") and replicas > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    devices = tf.config.list_logical_devices(kind)[:replicas]
    return tf.distribute.MirroredStrategy([device.name for device in devices], cross_device_ops=MajorityVote())


def images(folder: Path, options: argparse.Namespace, replicas: int, train: bool) -> tuple[Any, int]:
    """Return batches of all replicas together, and how many classes there are."""
    data = keras.utils.image_dataset_from_directory(
        folder,
        label_mode="int",
        batch_size=options.batch_size * replicas,
        image_size=(options.size, options.size),
        crop_to_aspect_ratio=True,
        shuffle=train,
        seed=0,
        verbose=False,
    )
    classes = len(data.class_names)
    if train:  # whole batches only, and Keras wants to know how many
        batches = len(data.file_paths) // (options.batch_size * replicas)
        data = data.unbatch().batch(options.batch_size * replicas, drop_remainder=True)
        data = data.apply(tf.data.experimental.assert_cardinality(batches))
    return data.prefetch(tf.data.AUTOTUNE), classes


def network(size: int, classes: int) -> Any:
    """Return Keras' ResNet-50 behind random flips and its own scaling."""
    x = inputs = keras.Input((size, size, 3))
    x = keras.layers.RandomFlip("horizontal")(x)
    x = keras.layers.Rescaling(1 / 127.5, -1)(x)
    body = keras.applications.ResNet50(weights=None, include_top=False, pooling="avg", input_shape=(size, size, 3))
    return keras.Model(inputs, keras.layers.Dense(classes)(body(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--replicas", type=int, default=1, help="of this machine")
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=128, help="of each replica")
    parser.add_argument("--size", type=int, default=224, help="of an image's side")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--beta", type=float, default=0.9, help="the paper's momentum; 0 with --verdict-momentum")
    parser.add_argument("--verdict-momentum", type=float, default=0.0)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--out", type=Path, default=Path("imagenet"), help="for the state and the log")
    options = parser.parse_args()
    state = options.out / "state"
    if state.exists() and not options.resume:
        parser.error(
            f"argument --out: {str(state)!r} has a run's state: add --resume to go on, or choose another folder"
        )
    keras.utils.set_random_seed(0)
    strategy = strategy_of(options.replicas)
    count = strategy.num_replicas_in_sync
    train, classes = images(options.folder / "train", options, count, True)
    val, _ = images(options.folder / "val", options, count, False)
    thirds = [max(1, options.epochs // 3), max(2, 2 * options.epochs // 3)]
    with strategy.scope():
        model = network(options.size, classes)
        betas = {"beta_1": options.beta, "beta_2": options.beta}
        settings = {"weight_decay": options.weight_decay, "verdict_momentum": options.verdict_momentum}
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(Signum(options.lr, **betas, **settings), loss, metrics=["accuracy"])

    def rate(epoch: int, _: float) -> float:
        return float(options.lr * 0.1 ** sum(epoch >= third for third in thirds))

    options.out.mkdir(parents=True, exist_ok=True)
    callbacks = [
        *([VoteMonitor()] if count > 1 else []),
        keras.callbacks.LearningRateScheduler(rate),
        keras.callbacks.BackupAndRestore(str(state), delete_checkpoint=False),
        keras.callbacks.CSVLogger(options.out / "log.csv", append=options.resume),
    ]
    model.fit(train, validation_data=val, epochs=options.epochs, callbacks=callbacks, verbose=2)
    steps = int(model.optimizer.iterations.numpy())
    print(f"after {options.epochs} epochs and {steps} steps: accuracy {model.evaluate(val, verbose=0)[1]:.2%}")


if __name__ == "__main__":
    main()
