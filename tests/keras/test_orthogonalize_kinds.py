"""Which variables of a model are orthogonalized, and in which layout: the rule that `Signum` writes down."""

from typing import Any

import keras
import pytest

from signsgd_keras import Signum

from .backends import Array, eighths, everywhere, everywhere_jax_nightly, numbers, train
from .models import weights
from .orthogonal import SETTINGS, Judge

layers = keras.layers


def transformer() -> Any:
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(8, 4, name="token_embedding")(tokens)
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    x = layers.GroupQueryAttention(3, 4, 2, name="grouped")(x, x)
    x = layers.LayerNormalization(axis=(1, 2), name="norm")(x)
    x = layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 5), bias_axes="de", name="einsum")(x)
    x = layers.Reshape((6, 10))(x)
    x = layers.GRU(3, return_sequences=True, name="gru")(x)
    return keras.Model(tokens, layers.Dense(8, name="output")(x), name="net")


def images() -> Any:
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(5, 3, name="conv"),
            layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise"),
            layers.DepthwiseConv2D(3, name="narrow"),
            layers.SeparableConv2D(4, 2, name="separable"),
            layers.PReLU(name="activation"),
            layers.Conv2D(1, 1, name="single"),
            layers.Reshape((1, 1)),
            layers.Conv1D(2, 1, name="vector"),
            layers.Conv1D(4, 1, name="query"),
            layers.Dense(2, name="dense"),
            layers.Flatten(),
            layers.Dense(1, name="output"),
        ],
        name="net",
    )


def built(model: Any, **settings: Any) -> Signum:
    optimizer = Signum(0.02, orthogonalize=True, **settings)
    optimizer.build(model.trainable_variables)
    return optimizer


def shapes(model: Any, optimizer: Signum) -> dict[str, tuple[int, int]]:
    """Path, without the model's name -> rows and columns."""
    polars = {v.path: optimizer.slot(v).update.polar for v in model.trainable_variables}
    return {path.removeprefix("net/"): polar.matrix[1:] for path, polar in polars.items() if polar is not None}


@everywhere_jax_nightly
def test_a_transformer() -> None:
    model = transformer()
    optimizer = built(model, exclude_layers=["(^|/)output/"])
    assert shapes(model, optimizer) == {
        "attention/query/kernel": (6, 4),
        "attention/key/kernel": (6, 4),
        "attention/value/kernel": (6, 4),
        "attention/attention_output/kernel": (4, 6),
        "grouped/query/kernel": (12, 4),
        "grouped/key/kernel": (6, 4),
        "grouped/value/kernel": (6, 4),
        "grouped/attention_output/kernel": (4, 12),
        "einsum/kernel": (5, 8),
        "gru/gru_cell/kernel": (9, 10),
        "gru/gru_cell/recurrent_kernel": (9, 3),
    }
    assert optimizer.orthogonalized == [v.path for v in model.trainable_variables if optimizer.slot(v).update.polar]


@everywhere_jax_nightly
def test_a_convolutional_model() -> None:
    model = images()
    assert shapes(model, built(model)) == {
        "conv/kernel": (5, 27),
        "separable/pointwise_kernel": (4, 10),
        "query/kernel": (4, 2),
        "dense/kernel": (2, 4),
        "output/kernel": (1, 2),
    }


class _Tokens(keras.layers.Layer):  # type: ignore[misc]
    """What vision transformers add to patches: vectors and tables with leading ones."""

    def build(self, shape: Any) -> None:
        for name, size in {"class_token": (1, 1, 16), "position": (1, 5, 16), "map": (1, 5, 2, 8)}.items():
            setattr(self, name, self.add_weight(shape=size, initializer="zeros", name=name))

    def call(self, x: Any) -> Any:
        return x + self.class_token + self.position + keras.ops.reshape(self.map, (1, 5, 16))


@everywhere
def test_vectors_and_tables_with_leading_ones_are_no_matrices() -> None:
    parts = [keras.Input((5, 16)), _Tokens(name="tokens"), layers.Conv1D(4, 1, name="conv"), layers.Dense(1, name="d")]
    model = keras.Sequential(parts, name="net")
    assert shapes(model, built(model)) == {"conv/kernel": (4, 16), "d/kernel": (1, 4)}


@everywhere_jax_nightly
def test_transposed_convolutions_are_no_matrices() -> None:
    """Keras keeps their kernels as (h, w, out, in)."""
    parts = [
        keras.Input((4, 4, 3)),
        layers.Conv2DTranspose(5, 2),
        layers.Conv2DTranspose(1, 2, name="myTransposed"),
        layers.Conv2D(6, 2, name="conv"),
    ]
    model = keras.Sequential(parts, name="net")
    assert shapes(model, built(model)) == {"conv/kernel": (6, 4)}


@everywhere
@pytest.mark.parametrize(
    ("settings", "matrices"),
    [
        ({}, ["hidden/kernel", "output/kernel"]),
        ({"exclude_layers": ["output"]}, ["hidden/kernel"]),
        ({"exclude_layers": ("h.dd",)}, ["output/kernel"]),
        ({"exclude_embeddings": False}, ["my_Embedding/embeddings", "hidden/kernel", "output/kernel"]),
    ],
)
def test_what_is_excluded(settings: dict[str, Any], matrices: list[str]) -> None:
    parts = [
        keras.Input((3,)),
        layers.Embedding(5, 4, name="my_Embedding"),
        layers.Dense(3, name="hidden"),
        layers.Dense(2, name="output"),
    ]
    model = keras.Sequential(parts, name="net")
    optimizer = built(model, **settings)
    assert [path.removeprefix("net/") for path in optimizer.orthogonalized] == matrices


@everywhere
def test_a_keyword_that_excludes_nothing_is_warned_of() -> None:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3, name="hidden"), layers.Dense(2, name="last")])
    with pytest.warns(UserWarning, match=r"exclude_layers=\['output'\] excludes nothing: no variable's path has it"):
        optimizer = built(model, exclude_layers=["output", "last"])
    assert [path.split("/")[-2] for path in optimizer.orthogonalized] == ["hidden"]


@everywhere
def test_the_recommended_settings() -> None:
    """Of all variables betas (0.9, 0.95) and no verdict momentum; of the others a rate that is 64 times lower."""
    model = keras.Sequential([keras.Input((3,)), layers.Dense(3, name="hidden"), layers.Dense(2, name="output")])
    optimizer = built(model, exclude_layers=["output"])
    updates = [optimizer.slot(v).update for v in model.trainable_variables]
    found = [(u.beta_1, u.beta_2, u.gamma, u.rate, u.polar is not None) for u in updates]
    assert found == [(0.9, 0.95, 0.0, 1.0, True)] + [(0.9, 0.95, 0.0, 1 / 64, False)] * 3
    plain = Signum(0.02)
    assert (plain.beta_1, plain.beta_2, plain.verdict_momentum) == (0.9, 0.9, 0.0)


@everywhere
def test_attention_steps_as_its_matrices() -> None:
    """Queries, keys and values have dim columns: 4, so that the step is exact. The output has 6."""
    layer = layers.MultiHeadAttention(2, 3, name="attention")
    layer.build((1, 5, 4), (1, 5, 4))
    xs, optimizer = layer.trainable_variables, Signum(**SETTINGS)
    start: list[Array] = [weights(x.shape, seed=k) for k, x in enumerate(xs)]
    for x, value in zip(xs, start, strict=True):
        x.assign(value)
    judge = Judge(start=start, matrices=(0, 2, 4, 6), columns_first=(0, 2, 4))
    for t in range(4):
        step = [eighths(*x.shape, seed=t) for x in xs]
        train(optimizer, [step], xs)
        judge.step([step])
    judge.check([numbers(x) for x in xs], inexact=[6])


def _built(layer: Any, *inputs: tuple[int, ...]) -> Any:
    layer.build(*inputs)
    return layer


def _matrices(layer: Any) -> dict[str, tuple[int, int]]:
    """The last layer's name -> rows and columns."""
    found = shapes(layer, built(layer))
    return {path.split("/")[-2]: matrix for path, matrix in found.items()}


@everywhere
@pytest.mark.parametrize("use_bias", [True, False])
def test_what_is_frozen_changes_no_layout(use_bias: bool) -> None:
    attention = layers.MultiHeadAttention(2, 3, use_bias=use_bias, use_gate=True)
    grouped = layers.GroupQueryAttention(3, 4, 2, use_bias=use_bias)
    expected: list[dict[str, tuple[int, int]]] = [
        {"query": (6, 4), "key": (6, 7), "value": (6, 7), "gate": (6, 4), "attention_output": (4, 6)},
        {"query": (12, 4), "key": (6, 7), "value": (6, 7), "attention_output": (4, 12)},
    ]
    for layer, matrices in zip((attention, grouped), expected, strict=True):
        _built(layer, (1, 5, 4), (1, 5, 7), (1, 5, 7))
        assert _matrices(layer) == matrices
        for frozen in ("attention_output", "value", "key"):
            next(part for part in layer._flatten_layers() if part.name == frozen).trainable = False
            assert _matrices(layer) == {name: matrices[name] for name in _matrices(layer)}
            assert frozen not in _matrices(layer)


@everywhere_jax_nightly
def test_layers_of_ones_own_with_an_attentions_names() -> None:
    """The bias (heads, size) tells a projection, where there is none its `dim`; its addition by LoRA is none."""
    einsum, equation = layers.EinsumDense, "abc,cde->abde"
    few = _built(einsum(equation, (None, 5, 2), bias_axes="de", name="key"), (1, 6, 3))
    per_head = _built(einsum("abc,dce->abde", (None, 2, 5), name="query"), (1, 6, 8))
    lora = _built(einsum(equation, (None, 2, 5), name="value"), (1, 6, 8))
    lora.enable_lora(3)
    convolution = _built(layers.Conv1D(8, 3, name="query"), (1, 9, 2))
    pointwise = _built(layers.Conv1D(8, 1, use_bias=False, name="query"), (1, 9, 2))
    assert _matrices(few) == {"key": (10, 3)}
    assert _matrices(per_head) == {"query": (5, 16)}
    assert [matrix[1:] for matrix in built(lora)._matrices.values] == [(3, 16), (5, 3)]
    assert (_matrices(convolution), _matrices(pointwise)) == ({"query": (8, 6)}, {"query": (8, 2)})


@everywhere
def test_nothing_to_orthogonalize() -> None:
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="output")])
    optimizer = Signum(orthogonalize=True, exclude_layers=["output"])
    with pytest.raises(ValueError, match="nothing to orthogonalize: none of the 2 variables") as error:
        optimizer.build(model.trainable_variables)
    assert str(error.value) == (
        "orthogonalize=True found nothing to orthogonalize: none of the 2 variables is a matrix or a kernel that is "
        "not excluded by exclude_layers=['output'] or exclude_embeddings=True: exclude less, or take "
        "orthogonalize=False"
    )
    assert not optimizer.built
    assert len(optimizer.variables) == 2  # the step's number, and the rate
    Signum(orthogonalize=True).build([])
