"""Which optimizer a saved state is from: the kinds of variables that it kept, its name, and the values tell."""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from .. import _compat, state

Optimizer = Any
"""A `Signum`; to be typed as one it would have to be imported, and it imports this module."""

MARK = "signum"
"""The entry of a store that no other optimizer writes: the kinds of variables that there are, as text in bytes."""

_KEPT = (
    "nothing was loaded into the optimizer. To take the model's weights alone, load them before compile() gives it an "
    "optimizer: model.load_weights(…), keras.models.load_model(…, compile=False) or tf.train.Checkpoint(model=model)"
)
_UNNAMED = "Variable"
"""How TensorFlow names what an asynchronous `tf.train.Checkpoint` copied: all alike, which tells no kind."""

_SCALE = frozenset(entry.name for entry in state.LOSS_SCALE)


def kind(path: str) -> str:
    """Return the kind of an optimizer's variable, from its path: an entry of the table, or the path's last part.

    Example:
        >>> kind("signum/net_one_kernel_verdict_momentum"), kind("adam/iteration"), kind("nadam/u_product")
        ('verdict_momentum', 'iteration', 'u_product')
    """
    return _kind(state.find(path), path)


def _kind(entry: state.Entry | None, path: str) -> str:
    return path.rsplit("/", 1)[-1] if entry is None else entry.name


def mark(optimizer: Optimizer) -> npt.NDArray[np.uint8]:
    """Return the value of `MARK` in the optimizer's files."""
    return np.frombuffer(" ".join(_kinds(optimizer)).encode(), np.uint8)


def check_store(optimizer: Optimizer, store: Any) -> bool:
    """Make sure that a file's state is no other optimizer's, nor a Signum's of other settings.

    Args:
        optimizer: that is to load it.
        store: what Keras hands to `load_own_variables`.

    Returns:
        Whether it is known to be a Signum's: by its `MARK`, or in older files by its name.

    Raises:
        ValueError: if it is another's.
    """
    if MARK in store.keys():  # noqa: SIM118  Keras' stores are no dicts
        _check_kinds(optimizer, np.asarray(store[MARK]).tobytes().decode().split())
        return True
    return check_name(optimizer, _compat.saved_name(store))


def check_name(optimizer: Optimizer, name: str | None) -> bool:
    """Make sure that a name is not one that Keras gives to its optimizers.

    Args:
        optimizer: that is to load the state.
        name: of the one that was saved; None where the file has none.

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


def check_checkpoint(optimizer: Optimizer, path: str) -> None:
    """Make sure that a `tf.train.Checkpoint` has a Signum's state, where it has any optimizer's.

    Of several optimizers in one file one must be a Signum: the file does not tell which of them is restored.

    Args:
        optimizer: that is to be restored.
        path: of the file.

    Raises:
        ValueError: if it has another's only, or a Signum's of other settings.
    """
    saved = {names[0].split("/")[0]: [kind(name) for name in names] for names in _compat.saved_variables(path)}
    saved = {name: kinds for name, kinds in saved.items() if not _SCALE & set(kinds)}  # but for loss scales
    if len(saved) > 1 and any(name == optimizer.name or name.startswith("signum") for name in saved):
        return
    for name, kinds in saved.items():
        known = check_name(optimizer, name)
        if _UNNAMED not in kinds:
            _check_kinds(optimizer, kinds)
        if not known:
            warn_of_unknown(optimizer, name)


def has_loss_scale(path: str) -> bool:
    """Tell whether a `tf.train.Checkpoint` may have a loss scale, or no optimizer at all."""
    saved = {kind(name) for names in _compat.saved_variables(path) for name in names}
    return not saved or bool({_UNNAMED, *_SCALE} & saved)


def check_values(optimizer: Optimizer, values: Sequence[npt.NDArray[Any]]) -> None:
    """Make sure that arrays are no other optimizer's, as far as their order and their values tell.

    Args:
        optimizer: that is to take them.
        values: one for each of its variables.

    Raises:
        ValueError: if there are two for each model variable, or one is larger than its entry's bound.
    """
    twos = [tuple(v.shape) for v in _compat.trainable_variables(optimizer) for _ in "mv"]
    found, expected = ([tuple(value.shape) for value in arrays] for arrays in (values, optimizer.variables))
    if found != expected and twos and found[-len(twos) :] == twos:
        raise ValueError(
            f"two arrays for each variable, one after the other, look like the state of Adam or its kin: {_KEPT}"
        )
    for variable, value in zip(optimizer.variables, values, strict=True):
        entry = state.entry_of(variable)
        if entry is None or entry.bound == float("inf"):
            continue
        size = float(np.abs(value).max(initial=0.0))
        if not size <= 1.001 * entry.bound:  # as NaN is not, either
            raise ValueError(
                f"the saved array for {variable.path} reaches {size:g}, and a {entry.name.replace('_', ' ')} lies in "
                f"[-{entry.bound:g}, {entry.bound:g}]: this looks like another optimizer's state; {_KEPT}"
            )


def warn_of_unknown(optimizer: Optimizer, name: str | None) -> None:
    """Warn that neither a mark nor a name tells which optimizer wrote a state."""
    warnings.warn(
        f"nothing tells which optimizer wrote the state{'' if name is None else f' of {name!r}'} that is loaded into "
        f"{optimizer.name!r}: it fits, but if it was no Signum, take the model's weights alone; its numbers are not "
        "momenta then",
        stacklevel=3,
    )


def _check_kinds(optimizer: Optimizer, saved: list[str]) -> None:
    kept, known = _kinds(optimizer), [entry.name for entry in state.SIGNUM]
    strange = [name for name in saved if name not in (*known, *kept)]
    if strange:
        raise ValueError(f"the saved optimizer kept {strange[0]!r}, which no Signum does: {_KEPT}")
    if optimizer.built and set(kept) != set(saved):
        raise ValueError(
            f"the saved Signum kept {', '.join(dict.fromkeys(saved))} and {optimizer.name!r} keeps {', '.join(kept)}: "
            "make it with the settings that were saved (beta_1, verdict_momentum, use_ema, "
            f"gradient_accumulation_steps, a schedule); {_KEPT}"
        )


def _kinds(optimizer: Optimizer) -> list[str]:
    return list(dict.fromkeys(_kind(state.entry_of(v), v.path) for v in optimizer.variables))
