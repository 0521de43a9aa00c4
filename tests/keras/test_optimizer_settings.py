"""`Signum`'s settings: what is refused with a sentence, what a configuration says, and what Keras finds it by."""

import inspect
from typing import Any

import keras
import pytest

from signsgd_core import warmup_steps
from signsgd_keras import Signum

from .backends import assert_equal, everywhere, gradients, train, variables

Settings = dict[str, Any]

BAD: tuple[tuple[Settings, str], ...] = (
    ({"learning_rate": -1.0}, "learning_rate must be 0 or more and finite, got -1.0"),
    ({"learning_rate": float("nan")}, "learning_rate must be 0 or more and finite, got nan"),
    ({"learning_rate": float("inf")}, "learning_rate must be 0 or more and finite, got inf"),
    ({"beta_1": 1.2}, "beta_1 must lie in [0, 1), got 1.2"),
    ({"beta_1": None}, "beta_1 must lie in [0, 1), got None"),
    ({"orthogonalize": 1}, "orthogonalize must be True or False, got 1"),
    ({"exclude_embeddings": None}, "exclude_embeddings must be True or False, got None"),
    ({"exclude_layers": "output"}, "exclude_layers must be a list of keywords such as [\"output\"], got 'output'"),
    ({"exclude_layers": [1]}, 'exclude_layers must be a list of keywords such as ["output"], got [1]'),
    (
        {"exclude_layers": ["("]},
        "exclude_layers must be regular expressions, and '(' is none (missing ), unterminated subpattern at position "
        "0): re.escape() makes one",
    ),
    ({"ns_steps": 0}, "ns_steps must be a whole number of 1 to 99, got 0"),
    (
        {"ns_coefficients": (1.0, 2.0)},
        "ns_coefficients must be three finite numbers such as (3.4445, -4.775, 2.0315), got (1.0, 2.0)",
    ),
    (
        {"other_learning_rate": 0.5},
        "other_learning_rate=0.5 is of the variables that are not orthogonalized: it needs orthogonalize=True",
    ),
    (
        {"other_lr_ratio": 0.5},
        "other_lr_ratio=0.5 is of the variables that are not orthogonalized: it needs orthogonalize=True",
    ),
    (
        {"orthogonalize": True, "other_lr_ratio": -1},
        "other_lr_ratio must be 0 or more and finite, got -1",
    ),
    (
        {"orthogonalize": True, "other_lr_ratio": 0.5, "other_learning_rate": 0.25},
        "give other_learning_rate or other_lr_ratio, not both, got 0.25, 0.5",
    ),
    (
        {"orthogonalize": True, "learning_rate": 0.0, "other_learning_rate": 0.25},
        "other_learning_rate=0.25 needs a learning_rate above 0 to be in proportion to, got 0.0: with a schedule give "
        "other_lr_ratio, the other rate divided by learning_rate",
    ),
    ({"beta_2": 1}, "beta_2 must lie in [0, 1), got 1"),
    ({"beta_2": float("nan")}, "beta_2 must lie in [0, 1), got nan"),
    ({"verdict_momentum": 1}, "verdict_momentum must lie in [0, 1), got 1"),
    ({"verdict_momentum": "0.5"}, "verdict_momentum must lie in [0, 1), got '0.5'"),
    ({"weight_decay": -1}, "weight_decay must be 0 or more and finite, got -1"),
    ({"weight_decay": "none"}, "weight_decay must be 0 or more and finite, got 'none'"),
    ({"weight_decay": ""}, "weight_decay must be 0 or more and finite, got ''"),
    ({"zeros": "random"}, "zeros must be one of 'alternate', 'abstain', 'positive', got 'random'"),
    ({"zeros": ""}, "zeros must be one of 'alternate', 'abstain', 'positive', got ''"),
    ({"warmup_steps": -1}, "warmup_steps must be 'auto' or a whole number of 0 or more, got -1"),
    ({"warmup_steps": 1.5}, "warmup_steps must be 'auto' or a whole number of 0 or more, got 1.5"),
    ({"clipnorm": -1.0}, "clipnorm must be above 0 and finite, got -1.0"),
    ({"clipvalue": "1"}, "clipvalue must be above 0 and finite, got '1'"),
    ({"global_clipnorm": 0.0}, "global_clipnorm must be above 0 and finite, got 0.0"),
    ({"use_ema": "yes"}, "use_ema must be True or False, got 'yes'"),
    ({"loss_scale_factor": 0.0}, "loss_scale_factor must be above 0 and finite, got 0.0"),
    ({"gradient_accumulation_steps": 2.5}, "gradient_accumulation_steps must be a whole number of 1 or more, got 2.5"),
    ({"warmup_steps": "x"}, "warmup_steps must be 'auto' or a whole number of 0 or more, got 'x'"),
)

OURS: tuple[Settings, ...] = (
    {},
    {"learning_rate": 0.5, "beta_1": 0.25, "beta_2": 0.75, "verdict_momentum": 0.5, "zeros": "alternate"},
    {"warmup_steps": "auto", "weight_decay": 0.5, "clipnorm": 2.0, "name": "vote"},
    {"warmup_steps": 3, "use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3, "clipvalue": 0.5},
    {"gradient_accumulation_steps": 3, "loss_scale_factor": 2.0, "global_clipnorm": 1.0, "zeros": "positive"},
    {"orthogonalize": True, "exclude_layers": ["x4"], "exclude_embeddings": False, "other_lr_ratio": 0.3},
)


def test_signature_is_the_documented_one() -> None:
    """Ours where Lion has its betas, then Lion's own in Lion's order, then SignMuon's, as Muon has its own."""
    ours, theirs = (
        [(key, p.default) for key, p in inspect.signature(cls.__init__).parameters.items()]
        for cls in (Signum, keras.optimizers.Lion)
    )
    assert ours[1:7] == [
        ("learning_rate", 1e-4),
        ("beta_1", 0.9),
        ("beta_2", None),
        ("verdict_momentum", 0.0),
        ("zeros", None),
        ("warmup_steps", 0),
    ]
    added = [
        ("orthogonalize", False),
        ("exclude_layers", None),
        ("exclude_embeddings", True),
        ("other_learning_rate", None),
        ("other_lr_ratio", None),
        ("ns_steps", 5),
        ("ns_coefficients", (3.4445, -4.775, 2.0315)),
    ]
    *lions, kwargs = [parameter for parameter in theirs if parameter[0] not in ("self", *dict(ours[1:7]))]
    assert ours[7:] == [*lions, *added, kwargs]


@pytest.mark.parametrize(("settings", "sentence"), BAD, ids=str)
def test_bad_setting_is_refused_with_a_sentence(settings: Settings, sentence: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        Signum(**settings)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"momentum": 0.9}, "Argument(s) not recognized: {'momentum': 0.9}"),
        ({"betas": (0.9, 0.9)}, "Argument(s) not recognized: {'betas': (0.9, 0.9)}"),
        ({"learning_rate": "fast"}, "Argument `learning_rate` should be float, or an instance of LearningRateSchedule"),
        ({"learning_rate": 1}, "Argument `learning_rate` should be float, or an instance of LearningRateSchedule"),
        ({"clipnorm": 1.0, "clipvalue": 1.0}, "Only one of `clipnorm`, `clipvalue` and `global_clipnorm` can be set."),
        ({"gradient_accumulation_steps": 1}, "`gradient_accumulation_steps` must be an integer >= 2."),
        ({"use_ema": True, "ema_momentum": 2.0}, "`ema_momentum` must be in the range [0, 1]."),
        ({"use_ema": True, "ema_overwrite_frequency": 0.5}, "`ema_overwrite_frequency` must be an integer >= 1"),
    ],
    ids=str,
)
def test_what_keras_refuses_is_refused_in_its_words(settings: Settings, start: str) -> None:
    for cls in (Signum, keras.optimizers.Lion):
        with pytest.raises(ValueError, match=".") as error:
            cls(**settings)
        assert str(error.value).startswith(start)


def test_a_bad_setting_in_a_configuration_is_refused_too() -> None:
    configuration = {**keras.optimizers.serialize(Signum()), "config": {**Signum().get_config(), "zeros": "random"}}
    with pytest.raises(ValueError, match=r"^zeros must be one of 'alternate', 'abstain', 'positive', got 'random'$"):
        keras.optimizers.deserialize(configuration)


@pytest.mark.parametrize("settings", [{"learning_rate": 0.0}, {"beta_1": 0, "beta_2": 0}, {"weight_decay": 0}], ids=str)
def test_borderline_setting_is_taken(settings: Settings) -> None:
    config = Signum(**settings).get_config()
    assert {key: config[key] for key in settings} == settings


def test_configuration_names_every_argument() -> None:
    arguments = set(inspect.signature(Signum.__init__).parameters) - {"self", "kwargs"}
    assert set(Signum().get_config()) == arguments
    assert Signum(warmup_steps="auto").get_config()["warmup_steps"] == "auto"
    assert Signum(warmup_steps="auto", beta_2=0.8)._warmup == warmup_steps(0.8) == 19
    assert Signum().zero_rule == "abstain"
    assert Signum(zeros="positive").zero_rule == "positive"


@everywhere
def test_configuration_makes_the_same_optimizer() -> None:
    """By every way Keras has."""
    for settings in OURS:
        original = Signum(**settings)
        assert original.get_config().items() >= settings.items()
        for copy in (
            Signum.from_config(original.get_config()),
            keras.optimizers.deserialize(keras.optimizers.serialize(original)),
            keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(original)),
            keras.optimizers.get(keras.optimizers.serialize(original)),
        ):
            assert type(copy) is Signum
            assert copy.get_config() == original.get_config()
    train(original, gradients(2))
    fresh = Signum.from_config(original.get_config())
    assert_equal(train(fresh, gradients(2)), train(Signum(**settings), gradients(2)))


@everywhere
def test_configuration_keeps_a_schedule_and_the_rate_in_force() -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, decay_steps=2, decay_rate=0.5)
    original = Signum(schedule)
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(original))
    assert_equal(train(copy, gradients()), train(original, gradients()))
    assert float(copy.learning_rate) == float(schedule(5)) < 0.1
    changed = Signum(0.5)
    changed.learning_rate = 0.25
    assert Signum.from_config(changed.get_config()).get_config()["learning_rate"] == 0.25


@everywhere
def test_names_by_which_keras_finds_it() -> None:
    """As of every registered class: its registered name, and its bare name only within a scope that says so."""
    for identifier in ("signsgd>Signum", {"class_name": "signsgd>Signum", "config": {"beta_1": 0.5}}):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(optimizer=identifier, loss="mse")
        assert type(model.optimizer) is Signum
        assert model.optimizer.beta_1 == (0.9 if isinstance(identifier, str) else 0.5)
    with pytest.raises(ValueError, match="Could not interpret optimizer identifier: Signum"):
        keras.optimizers.get("Signum")
    with keras.saving.custom_object_scope({"Signum": Signum}):
        assert type(keras.optimizers.get("Signum")) is Signum
    assert keras.saving.get_registered_name(Signum) == "signsgd>Signum"
    assert keras.saving.get_registered_object("signsgd>Signum") is Signum


@everywhere
def test_unknown_variables_are_refused_as_keras_does() -> None:
    optimizer = Signum()
    train(optimizer, gradients(1))
    with pytest.raises(ValueError, match="^Unknown variable: "):
        train(optimizer, gradients(1), variables())
    with pytest.raises(ValueError, match="the optimizer must already be built on a list of variables"):
        Signum().apply([keras.ops.ones(2)])
