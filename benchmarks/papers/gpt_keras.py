"""The same question in Keras: votes of four replicas beside Keras' own AdamW and Muon, on a small GPT.

python -m benchmarks.papers.gpt_keras --text FILE --out benchmarks/results/papers

A `MirroredStrategy` of four CPU replicas and `model.fit`, with the text and batches of signmuon.py. Keras' Muon takes
variables of two dimensions, so that queries, keys and values have a `Dense` layer each. Tuned as there. What was
trained is kept in trainings.json.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from .common import command_line, heading, publish
from .methods import CLIPPED, Job
from .search import Found, search
from .tasks import Task, Text, add_arguments, text_of
from .training import SEEDS, Run, Store

WORKERS, STEPS, WARMUP, POINTS = 4, 500, 20, 20
OUTPUT = "logits"
"""The output layer, which is no hidden matrix."""
START: dict[str, tuple[float, float | None]] = {
    "SignMuon": (0.08, 2e-3),
    f"Muon{CLIPPED}": (0.02, 4e-3),
    f"AdamW{CLIPPED}": (4e-3, None),
    "Signum": (4e-4, None),
}
"""Where the search of a method begins: its learning rate, and that of what is no hidden matrix."""
DECAYS = (0.1, 0.0)


class KerasText(Text):
    """The text for a Keras model."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.key, self.name = f"keras-{self.key}", "GPT on bytes, Keras"

    def keras_model(self) -> Any:
        """Return an untrained decoder of transformer blocks, drawn from Keras' seed."""
        import keras
        from keras import layers, ops

        width, depth, length = self.shape
        heads, normal = max(1, width // 32), keras.initializers.RandomNormal(stddev=0.02)

        def dense(units: int, **settings: Any) -> Any:
            return layers.Dense(units, kernel_initializer=normal, **settings)

        def attention(x: Any) -> Any:
            q, k, v = (ops.reshape(dense(width)(x), (-1, length, heads, width // heads)) for _ in range(3))
            y = ops.dot_product_attention(q, k, v, is_causal=True)
            return dense(width)(ops.reshape(y, (-1, length, width)))

        places = np.arange(length)[None]
        given = keras.Input((length,), dtype="int32")
        x = layers.Embedding(256, width, embeddings_initializer=normal)(given)
        x = x + layers.Embedding(length, width, embeddings_initializer=normal)(ops.zeros_like(given) + places)
        for _ in range(depth):
            x = x + attention(layers.LayerNormalization()(x))
            x = x + dense(width)(dense(4 * width, activation="gelu")(layers.LayerNormalization()(x)))
        return keras.Model(given, dense(256, name=OUTPUT)(layers.LayerNormalization()(x)))

    def keras_score(self, model: Any) -> float:
        """Return the loss on text that was not trained on."""
        rows = self.rows().numpy()
        return float(model.evaluate(rows[:, :-1], rows[:, 1:], batch_size=64, verbose=0))


def optimizer(job: Job) -> Any:
    """Return a job's Keras optimizer."""
    import keras

    from signsgd_keras import Signum

    warmup = max(1, job.steps // WARMUP)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, job.steps - warmup, warmup_target=job.lr, warmup_steps=warmup
    )
    name, norm = job.method.removesuffix(CLIPPED), 1.0 if job.method.endswith(CLIPPED) else None
    settings: dict[str, Any] = {"weight_decay": job.weight_decay, "global_clipnorm": norm}
    ratio = (job.other_lr or job.lr) / job.lr
    if name == "AdamW":
        return keras.optimizers.AdamW(schedule, **settings)
    if name == "Muon":
        settings |= {"adam_lr_ratio": ratio, "adam_weight_decay": job.weight_decay, "exclude_layers": [OUTPUT]}
        return keras.optimizers.Muon(schedule, **settings)
    if name == "SignMuon":
        settings |= {"orthogonalize": True, "exclude_layers": [OUTPUT], "other_lr_ratio": ratio}
    return Signum(schedule, **settings)


def train(task: Task, job: Job, scored: bool = False) -> Run:
    """Train once, by `model.fit`; the arguments are those of training.py's."""
    assert isinstance(task, KerasText)
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    if tf.config.get_logical_device_configuration(cpu) is None:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * job.workers)
    keras.backend.clear_session()
    keras.utils.set_random_seed(job.seed)
    sources = [np.random.default_rng([job.seed, worker]) for worker in range(job.workers)]

    def batches() -> Iterator[tuple[Any, Any]]:
        while True:
            drawn = [task.batch(task.global_batch // job.workers, source) for source in sources]
            x, y = (np.concatenate([part.numpy() for part in parts]) for parts in zip(*drawn, strict=True))
            yield x, y

    row = tf.TensorSpec((task.global_batch, task.context), tf.int64)
    data = tf.data.Dataset.from_generator(batches, output_signature=(row, row)).prefetch(2)
    devices = [f"CPU:{k}" for k in range(job.workers)]
    with tf.distribute.MirroredStrategy(devices).scope():
        model = task.keras_model()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer(job), loss)
    points = min(POINTS, job.steps)
    steps = job.steps // points
    watched = [keras.callbacks.TerminateOnNaN()]
    losses = model.fit(data, epochs=points, steps_per_epoch=steps, verbose=0, callbacks=watched).history["loss"]
    curve = [(steps * (k + 1), float(loss)) for k, loss in enumerate(losses)]
    return Run(task.keras_score(model) if math.isfinite(losses[-1]) else math.nan, curve)


def table(task: Task, found: list[Found]) -> Iterator[str]:
    """Return the lines."""
    job = found[0].row.job
    yield f"{task.name}, {job.steps} steps of {task.global_batch} examples, {job.workers} replicas: {task.measured}"
    yield f"  {'method':<20}{'lr':>9}{'other lr':>9}{'decay':>7}{'runs':>6}{'mean':>9}{'±':>8}"
    for one in found:
        job = one.row.job
        other = "" if job.other_lr is None else f"{job.other_lr:.3g}"
        tried = f"{one.tried}{'' if one.inside else '*'}"
        yield (
            f"  {job.method:<20}{job.lr:>9.3g}{other:>9}{job.weight_decay:>7.3g}"
            f"{tried:>6}{one.row.mean:>9.4f}{one.row.spread:>8.4f}"
        )
    yield "  runs: of tuning, one seed, * with the best at an edge"
    yield f"  then mean and standard deviation of {len(SEEDS)} seeds"


def draw(task: Task, found: list[Found], pyplot: Any) -> Any:
    """Return a figure: the training loss of each method."""
    figure, axes = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    for one in found:
        steps, losses = one.row.curve
        axes.plot(steps, losses, label=f"{one.row.job.method}: {one.row.mean:.3f} in the end, on other text")
    axes.set(xlabel="step", ylabel="training loss, nats a byte", title=f"{task.name}, {WORKERS} replicas")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    parser = command_line("gpt_keras", __doc__)
    add_arguments(parser)
    parser.add_argument("--processes", type=int, help="trainings at a time (default: one a core)")
    options = parser.parse_args()
    width, layers, context = (16, 1, 16) if options.short else (64, 2, 64)
    task = KerasText(text_of(options), width, layers, context)
    store = Store(options.out, processes=options.processes, trainer=train)
    steps, runs, most = (2, 2, 2) if options.short else (STEPS, 6, 14)
    found = []
    for method, (lr, other) in START.items():
        job = Job(task.key, method, lr, DECAYS[0], WORKERS, steps, other_lr=other)
        found.append(search(task, store, job, DECAYS, runs, most))
    lines = [heading("gpt_keras"), *table(task, found)]
    publish("gpt_keras", lines, lambda pyplot: draw(task, found, pyplot), options.out)


if __name__ == "__main__":
    main()
