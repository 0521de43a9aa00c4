"""Whose state it is: what was saved tells which optimizer wrote it and what that one kept."""

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt

from . import internals

if TYPE_CHECKING:
    from .optimizer import Signum

MARK = "signum"
"""The entry of a store that no other optimizer writes: what kinds of variables there are, as text in bytes."""

_KINDS = ("iteration", "learning_rate", "average", "gradient_accumulator", "verdict_momentum", "momentum")
_KEPT = (
    "nothing was loaded into the optimizer. To take the model's weights alone, load them before compile() gives it an "
    "optimizer: model.load_weights(…), keras.models.load_model(…, compile=False) or tf.train.Checkpoint(model=model)"
)


def kind(path: str) -> str:
    """Return what an optimizer's variable is, from its path.

    Example:
        >>> kind("signum/net_one_kernel_verdict_momentum"), kind("adam/iteration"), kind("nadam/u_product")
        ('verdict_momentum', 'iteration', 'u_product')
    """
    last = path.rsplit("/", 1)[-1]
    return next((known for known in _KINDS if f"_{last}".endswith(f"_{known}")), last)


def mark(optimizer: "Signum") -> npt.NDArray[np.uint8]:
    """Return what tells this optimizer's files from others'."""
    return np.frombuffer(" ".join(_kinds(optimizer)).encode(), np.uint8)


def check_store(optimizer: "Signum", store: Any) -> bool:
    """Make sure that what Keras read from a file is no other optimizer's state, nor a Signum's of other settings.

    Args:
        optimizer: that is to load it.
        store: what Keras hands to `load_own_variables`.

    Returns:
        Whether it is known to be a Signum's: from what it says since there is a `MARK`, before that from its name.

    Raises:
        ValueError: if it is another's.
    """
    if MARK in store.keys():  # noqa: SIM118  Keras' stores are no dicts
        _check_kinds(optimizer, np.asarray(store[MARK]).tobytes().decode().split())
        return True
    return check_name(optimizer, internals.saved_name(store))


def check_name(optimizer: "Signum", name: str | None) -> bool:
    """Make sure that a name is not the one that Keras gives to an optimizer of its own.

    Args:
        optimizer: that is to load the state.
        name: of the one that was saved; None where nothing tells.

    Returns:
        Whether it is a Signum's.

    Raises:
        ValueError: if it is another's.
    """
    if name is None or name == optimizer.name or re.fullmatch(r"signum(_\d+)?", name):
        return name is not None
    plain = re.sub(r"_\d+$|_", "", name).lower()
    classes = [key for key, found in vars(keras.optimizers).items() if isinstance(found, type)]
    theirs = [key for key in classes if key.lower() == plain and key not in ("Optimizer", "LossScaleOptimizer")]
    if theirs:
        raise ValueError(
            f"the saved state of {name!r} looks like that of keras.optimizers.{theirs[0]}, whose numbers mean nothing "
            f"to Signum: {_KEPT}"
        )
    return False


def check_checkpoint(optimizer: "Signum", path: str) -> None:
    """Make sure that a file of `tf.train.Checkpoint` has a Signum's state in it, where it has any optimizer's.

    Of several optimizers, as two players have them, one must be a Signum: which of them is restored here is not told.

    Args:
        optimizer: that is to be restored.
        path: of the file.

    Raises:
        ValueError: if it has another's only, or a Signum's of other settings.
    """
    saved = {names[0].split("/")[0]: [kind(name) for name in names] for names in internals.saved_variables(path)}
    saved = {name: kinds for name, kinds in saved.items() if "dynamic_scale" not in kinds}  # what a scale is around
    if len(saved) > 1 and any(name == optimizer.name or name.startswith("signum") for name in saved):
        return
    for name, kinds in saved.items():
        told = check_name(optimizer, name)
        _check_kinds(optimizer, kinds)
        if not told:
            doubt(optimizer, name)


def check_values(optimizer: "Signum", values: Sequence[npt.NDArray[Any]]) -> None:
    """Make sure that arrays are no other optimizer's, as far as their order and their values tell.

    Args:
        optimizer: that is to take them.
        values: one for each of its variables.

    Raises:
        ValueError: if they lie by twos, or what is to become a mean of verdicts does not lie in [-1, 1].
    """
    twos = [tuple(v.shape) for v in optimizer._trainable_variables for _ in "mv"]
    found, own = ([tuple(value.shape) for value in arrays] for arrays in (values, optimizer.variables))
    if found != own and twos and found[-len(twos) :] == twos:
        raise ValueError(
            f"two arrays for each variable, one after the other, look like the state of Adam or its kin: {_KEPT}"
        )
    for variable, value in zip(optimizer.variables, values, strict=True):
        size = float(np.abs(value).max(initial=0.0)) if kind(variable.path) == "verdict_momentum" else 0.0
        if not size < 1.001:  # which NaN is not, either
            raise ValueError(
                f"what was saved for {variable.path} reaches {size:g}, and a mean of verdicts lies in [-1, 1]: this "
                f"looks like another optimizer's state; {_KEPT}"
            )


def doubt(optimizer: "Signum", name: str | None) -> None:
    """Warn that nothing tells whose state it is."""
    warnings.warn(
        f"nothing tells which optimizer wrote the state{'' if name is None else f' of {name!r}'} that is loaded into "
        f"{optimizer.name!r}: it fits, but if it was no Signum, take the model's weights alone; its numbers are not "
        "momenta then",
        stacklevel=3,
    )


def _check_kinds(optimizer: "Signum", saved: list[str]) -> None:
    own = _kinds(optimizer)
    strange = [name for name in saved if name not in (*_KINDS, *own)]
    if strange:
        raise ValueError(f"the saved optimizer kept {strange[0]!r}, which no Signum does: {_KEPT}")
    if optimizer.built and set(own) != set(saved):
        raise ValueError(
            f"the saved Signum kept {', '.join(dict.fromkeys(saved))} and {optimizer.name!r} keeps {', '.join(own)}: "
            "make it with the settings that were saved (beta_1, verdict_momentum, use_ema, "
            f"gradient_accumulation_steps, a schedule); {_KEPT}"
        )


def _kinds(optimizer: "Signum") -> list[str]:
    return list(dict.fromkeys(kind(v.path) for v in optimizer.variables))
