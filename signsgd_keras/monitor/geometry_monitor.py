"""GeometryMonitor: whether signs are as good as gradients for the model that is training."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from absl import logging
from keras import ops

from signsgd_core.analysis.geometry import NAMES, Moments, density, hessian_diagonal, sample
from signsgd_core.analysis.report import GeometryReport, check_monitor

from .. import backend
from .optimizers import GradientTap

Tensor = Any
Variable = Any
Array = npt.NDArray[Any]


class GeometryMonitor(keras.callbacks.Callback):  # type: ignore[misc]
    """Log densities and signal-to-noise of gradients, and say at the end what they mean for training by signs.

    Each `every_n_steps` steps the gradients of the first `samples` of them, as the optimizer gets them, before it
    clips them itself, become mean and moments of a random choice of coordinates; those of all replicas are taken
    together, each replica's own ones. The names and meaning: see `signsgd_core.analysis.geometry`. The logs of an
    epoch have the latest ones, NaN before the first. It works with every optimizer and backend; of a
    `LossScaleOptimizer` it sees the unscaled gradients, of accumulated gradients the single ones, while a step is
    an update, of several batches. A gradient that is not finite is left out.

    By default it keeps 6.6 MB a replica and takes well under 2% of the time of a step of 70 ms.

    At the end of training `geometry.json` and, with matplotlib, `geometry.png` are written, and the advice of
    `signsgd_core.analysis.advice` is printed, on several workers by the first. A run shorter than `every_n_steps` is
    looked at as far as it goes.

    Put it first among the callbacks, so that `CSVLogger`, `TensorBoard` and the others find the figures in their logs.
    On several workers all of them need it. Keras does not tell callbacks of an error: after one that ends `fit` the
    optimizer is looked at, for nothing, until a `fit` with a monitor ends.

    Args:
        every_n_steps: how often to log.
        samples: how many of these steps to look at, from 2 on.
        coordinates: how many of the model's parameters to look at. A choice can miss a few giants among millions, and
            densities then come out too high.
        curvature_loss: a loss, of the model alone, such as that of one batch kept aside; its Hessian's diagonal is then
            estimated by 8 products each time figures are logged, which takes the time of some twenty steps. It must
            change nothing in the model.
        directory: for the files; None writes none.

    Attributes:
        report: `signsgd_core.analysis.report.GeometryReport` of the last `fit`; None before it.

    Raises:
        ValueError: if a number is outside its range.
        RuntimeError: at the start of `fit`, without an optimizer.

    Example:
        >>> callbacks = [GeometryMonitor(every_n_steps=500), keras.callbacks.CSVLogger("log.csv")]
    """

    def __init__(
        self,
        every_n_steps: int = 200,
        samples: int = 100,
        coordinates: int = 16_384,
        curvature_loss: Callable[[Any], Tensor] | None = None,
        directory: str | Path | None = "geometry",
    ) -> None:
        check_monitor(every_n_steps, samples, coordinates)
        super().__init__()
        self.every_n_steps, self.samples, self.coordinates = every_n_steps, samples, coordinates
        self.curvature_loss, self.directory = curvature_loss, directory
        self.report: GeometryReport | None = None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Start to look at gradients."""
        if self.model.optimizer is None:
            raise RuntimeError("GeometryMonitor has no gradients to look at: compile the model with an optimizer")
        self._optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        self._figures = dict.fromkeys(NAMES, math.nan)
        self._last, self.report = self._steps(), None
        self._start()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Note from where its batches count."""
        self._before = self._steps()

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Take stock, where it is time: at a batch's end Keras would wait for its logs each step, for us alone."""
        if self.report is None:
            self._start()
        accumulated = self._optimizer.gradient_accumulation_steps or 1
        self._record(self._before + batch // accumulated, self.every_n_steps)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add the latest figures."""
        self._record(self._steps(), self.every_n_steps)
        if logs is not None:  # CSVLogger keeps the columns of its first epoch
            logs.update(self._figures)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Stop looking; write the files and print the advice."""
        if self.report is None:
            return
        if not self.report.records:
            self._record(self._steps(), 2)
        self._tap.remove()
        self.model.make_train_function(force=True)
        if self._rows.is_first_worker:
            show = print if keras.config.is_interactive_logging_enabled() else logging.info
            for sentence in self.report.save(None if self.directory is None else Path(self.directory)):
                show(sentence)

    def _steps(self) -> int:
        return int(ops.convert_to_numpy(self._optimizer.iterations))  # where gradients are accumulated no variable

    def _start(self) -> None:
        """Choose coordinates, and let Keras trace its step anew, with what keeps their gradients in it."""
        self._variables = list(self.model.trainable_variables)
        if not self._variables:  # TensorFlow builds a model that has no Input in its first step
            return
        sizes = [math.prod(v.shape) for v in self._variables]
        self._chosen = [backend.current().indices(at.astype(np.int32)) for at in sample(sizes, self.coordinates)]
        coordinates = sum(len(at) for at in self._chosen)
        self._rows = backend.current().gradient_rows(self.model, self.samples, coordinates)
        self.report = GeometryReport(self._rows.replicas, sum(sizes), coordinates)
        self._tap = GradientTap(self._optimizer, self._keep, self.params)
        self.model.make_train_function(force=True)

    def _keep(self, gradients: Sequence[Tensor], variables: Sequence[Variable]) -> None:
        """Keep the chosen coordinates of gradients that the optimizer applies."""
        found = dict(zip(map(id, variables), gradients, strict=True))
        tensors = [found.get(id(v)) for v in self._variables]
        self._rows.put(lambda: _sampled(tensors, self._variables, self._chosen))

    def _record(self, steps: int, least: int) -> None:
        """Make figures of the gradients since the last time, if these are enough; all workers do it at one step."""
        if self.report is None or steps - self._last < least:
            return
        self._last = steps
        finite = [kept[np.isfinite(kept).all(1)] for kept in self._rows.take()]
        local = [Moments.pack(Moments.of(kept) if len(kept) else None, self.report.coordinates) for kept in finite]
        moments = Moments.unpack(self._rows.gather(local))
        if moments is not None and moments.count >= 2:
            self._figures = self.report.add(steps, moments, self._curvature())

    def _curvature(self) -> float:
        """Return the density of the Hessian's diagonal in the chosen coordinates; NaN where it is not asked for."""
        if self.curvature_loss is None:
            return math.nan
        model = self.model  # being asked for it, Keras gives JAX' variables their values, which its loop has
        product = backend.current().hessian_product(self.curvature_loss, model, self._variables)
        ends = np.cumsum([len(at) for at in self._chosen])[:-1]

        def sampled_product(z: Array) -> Array:
            parts = zip(np.split(z, ends), self._variables, self._chosen, strict=True)
            found = product([_scattered(*part) for part in parts])
            return ops.convert_to_numpy(_sampled(found, self._variables, self._chosen))  # type: ignore[no-any-return]

        return density(np.abs(hessian_diagonal(sampled_product, sum(len(at) for at in self._chosen))))


def _sampled(tensors: Sequence[Tensor], variables: Sequence[Variable], chosen: Sequence[Tensor]) -> Tensor:
    """Return the chosen coordinates of each variable's tensor in one row, float32; zeros where there is no tensor."""

    def part(tensor: Tensor, variable: Variable, at: Tensor) -> Tensor:
        if tensor is None:
            return ops.zeros(at.shape, "float32")
        return ops.cast(ops.take(ops.reshape(backend.current().dense(tensor, variable), (-1,)), at), "float32")

    return ops.concatenate([part(*each) for each in zip(tensors, variables, chosen, strict=True) if len(each[2])])


def _scattered(values: Array, variable: Variable, at: Tensor) -> Tensor:
    """Return a tensor like the variable, of these values where chosen and zeros elsewhere."""
    full = np.zeros(math.prod(variable.shape), np.float32)
    full[ops.convert_to_numpy(at)] = values
    return ops.convert_to_tensor(full.reshape(variable.shape), variable.dtype)
