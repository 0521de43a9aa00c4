"""Signum: a Keras optimizer on every backend, and the voter of its replica under `tf.distribute`."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

import signsgd_core as core
from signsgd_core import Matrices, WarmupSteps, Zeros

from . import backend, state
from .checkpoints import origin, saving
from .polar import NewtonSchulz, Polar, Selection
from .settings import AGREED, check_factors, check_flag, check_keywords, lr_ratio
from .slot import Slot
from .step import Accumulation, StepInput
from .update import Update
from .variables import check_real, check_shapes, path

Tensor = Any
Variable = Any


@keras.saving.register_keras_serializable(package="signsgd")
class Signum(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Train by sign momentum: signSGD, Signum, Lion, verdict momentum, or SignMuon, by its settings.

    ```
    c_i = β1·m_i + (1−β1)·g_i        m_i ← β2·m_i + (1−β2)·g_i        V = majority_i(sign c_i)
    u ← γ·u + (1−γ)·V                x ← x − lr·(u + λ·x)
    ```

    and for a matrix that is orthogonalized

    ```
    V = majority_i(sign polar(c_i))                x ← x − lr·(V/√fan_in + λ·x)
    ```

    | setting | is |
    |---|---|
    | `beta_1=0.0, beta_2=0.0` | signSGD |
    | `beta_1=β, beta_2=β`, the default | Signum |
    | `beta_1 ≠ beta_2`, e.g. 0.9 and 0.99 | Lion |
    | `beta_1=0.0, beta_2=0.0, verdict_momentum=0.8` | voted signSGD with verdict momentum |
    | `orthogonalize=True, exclude_layers=["output"]` | SignMuon for matrices, voted Lion for all the rest |

    With one replica it is a worker whose verdict is its own ballot, on TensorFlow, JAX and torch. Made in the scope of
    a `tf.distribute.MirroredStrategy` or a `MultiWorkerMajorityVoteStrategy`, every step is a majority vote of all
    replicas: each clips and accumulates its own gradients and keeps its own momentum. A gradient entry that is NaN,
    ±Inf or beyond float32's range counts as 0, and so do all that are clipped by a norm with such a one in it; a
    variable without a gradient stays untouched.

    The momenta are float32 whatever the variable's dtype, and exist only where a setting needs them. Under
    ``mixed_float16`` take `LossScaleOptimizer(Signum(…))`, by which every replica has a loss scale of its own: Keras'
    own, which `compile` would take, drops the step of all replicas where the first one overflows.

    **SignMuon.** With `orthogonalize=True` a worker votes on a matrix by the signs of its direction's polar factor,
    near ``U·Vᵀ`` of the singular value decomposition, by Newton–Schulz in float32. Which variables are matrices is
    decided when the optimizer is built, and `orthogonalized` names them. `keras.optimizers.Muon` takes those of two
    dimensions only; here

    - Variables of two to four dimensions are, but for biases and the scales of normalizations and activations. All
      others vote by the signs of the direction itself, at a learning rate of their own.
    - Of three or four dimensions, vectors such as a class token (1, 1, dim) are not. Nor are tables such as the
      positions (1, length, dim): all that has a first dimension of 1 and a name that does not end in "kernel".
    - Embeddings and what `exclude_layers` names are not. Usually name your output layer there.
    - A kernel's last dimension has the rows, all dimensions before it are the `fan_in` columns: (in, out) of a `Dense`
      layer, (h, w, in, out) of a convolution, (heads, size, dim) of the output of a `MultiHeadAttention`.
    - The kernels (dim, heads, size) of layers named `query`, `key`, `value` or `gate` have `dim` columns, also those
      of an `EinsumDense` of your own. Their bias (heads, size) tells them; without a bias, that `dim` is at least
      `heads`. Any other `EinsumDense` has its rows last.
    - Kernels with "depthwise" in their path are not, nor are those of convolutions with a single filter: they have no
      matrix of more than one row.
    - Kernels with "transpose" in their path are not: Keras keeps those of transposed convolutions as (h, w, out, in).
      Where such a layer has another name, name it in `exclude_layers`.
    - A kernel that holds several matrices, as that of a recurrent layer does, is orthogonalized as one.

    Args:
        learning_rate: A float, a `keras.optimizers.schedules.LearningRateSchedule` instance, or a callable that takes
            no arguments and returns the actual value to use. Defaults to `1e-4`. First try a fifth of the rate that
            AdamW has, or with `verdict_momentum` twice that rate, or with `orthogonalize` twice the rate of Muon,
            such as 0.08.
        beta_1: β1 in [0, 1), the weight of the momentum in the direction.
        beta_2: β2 in [0, 1), the weight of the momentum in the next one. Defaults to 0.9, with `orthogonalize` to
            0.95.
        verdict_momentum: γ in [0, 1); measured best at 0.8 or below, and with betas of 0.
        zeros: what exact zeros and ties count as: `"alternate"` (default with several replicas), `"abstain"` (default
            with one) or `"positive"`; see `signsgd_core.zero_bit`.
        warmup_steps: for how many first steps the ballot is the sign of the gradient while the momentum accumulates;
            `"auto"` is C(β2) of `signsgd_core.warmup_steps`.
        weight_decay: λ, decoupled. Float or `None`.
        clipnorm: Float. If set, the gradient of each variable is clipped to this norm, on each replica by itself. Under
            `fit` Keras divides the loss, and so what this and the next two clip, by the number of replicas.
        clipvalue: Float. If set, the gradient is clipped to be no higher than this value.
        global_clipnorm: Float. If set, the gradients of all variables are clipped together to this norm.
        use_ema: Boolean. If `True`, an exponential moving average of the variables is kept.
        ema_momentum: Float. The momentum of that average.
        ema_overwrite_frequency: Int or `None`. Every so many steps the variables are overwritten by their average.
        loss_scale_factor: Float or `None`. The loss is multiplied by it, and the gradients divided.
        gradient_accumulation_steps: Int or `None`. Vote once in so many steps, with the mean of the gradients since.
        name: String. The name of the optimizer.
        orthogonalize: Boolean. Whether matrices vote by their polar factor.
        exclude_layers: List of strings, keywords of layers to exclude: regular expressions that `re.search` looks for
            in the paths of variables. One that is found in none is warned of.
        exclude_embeddings: Boolean. Whether to exclude variables with "embedding" in their path.
        other_learning_rate: Float. The rate of the variables that are no matrices, where `learning_rate` is a float
            too. The two stay in this proportion, whatever sets or schedules `learning_rate`.
        other_lr_ratio: Float. That proportion itself, the other rate divided by `learning_rate`: with a schedule, give
            this one. Defaults to 1/64.
        ns_steps: Int. Newton–Schulz iterations.
        ns_coefficients: Three floats, the coefficients of each. It is recommended to use the default.

    Attributes:
        orthogonalized: the paths of the variables that are orthogonalized, once this is built.

    Raises:
        ValueError: if a setting is outside its range, or, when this is built or at the first step, if optimizer or
            variables were not made in the scope of the strategy that runs them, it cannot vote, there is no matrix to
            orthogonalize, or a gradient has another shape than its variable.

    References:
        - [signSGD, Signum, momentum warmup](https://arxiv.org/abs/1802.04434)
        - [majority vote](https://arxiv.org/abs/1810.05291)
        - [Lion](https://arxiv.org/abs/2302.06675)
        - [SignMuon](https://arxiv.org/abs/2605.16311)
        - [Muon](https://kellerjordan.github.io/posts/muon/), [its scale](https://arxiv.org/abs/2502.16982)

    Example:
        >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        >>> model.compile(optimizer=Signum(learning_rate=1e-3), loss="mse")
        >>> model.compile(optimizer=Signum(0.02, orthogonalize=True), loss="mse")
    """

    def __init__(
        self,
        learning_rate: Any = 1e-4,
        beta_1: float = 0.9,
        beta_2: float | None = None,
        verdict_momentum: float = 0.0,
        zeros: Zeros | None = None,
        warmup_steps: WarmupSteps = 0,
        weight_decay: float | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        ema_overwrite_frequency: int | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        name: str | None = None,
        orthogonalize: bool = False,
        exclude_layers: Sequence[str] | None = None,
        exclude_embeddings: bool = True,
        other_learning_rate: float | None = None,
        other_lr_ratio: float | None = None,
        ns_steps: int = core.NS_STEPS,
        ns_coefficients: Sequence[float] = core.NS_COEFFICIENTS,
        **kwargs: Any,
    ) -> None:
        check_flag("orthogonalize", orthogonalize)
        check_flag("exclude_embeddings", exclude_embeddings)
        keywords = check_keywords(exclude_layers)
        core.check_newton_schulz(ns_steps, ns_coefficients)
        beta_2 = (0.95 if orthogonalize else 0.9) if beta_2 is None else beta_2
        if isinstance(learning_rate, float):
            core.check_size("learning_rate", learning_rate)
        for share, value in (("beta_1", beta_1), ("beta_2", beta_2), ("verdict_momentum", verdict_momentum)):
            core.check_share(share, value)
        core.check_size("weight_decay", 0.0 if weight_decay is None else weight_decay)
        check_flag("use_ema", use_ema)
        check_factors(clipnorm=clipnorm, clipvalue=clipvalue, global_clipnorm=global_clipnorm)
        check_factors(loss_scale_factor=loss_scale_factor)
        if gradient_accumulation_steps is not None:
            core.check_count("gradient_accumulation_steps", gradient_accumulation_steps, 1)
        if zeros is not None:
            core.check_zeros(zeros)
        warmup = core.check_warmup_steps(warmup_steps, beta_2)
        ratio = lr_ratio(orthogonalize, learning_rate, other_learning_rate, other_lr_ratio)
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )
        self.beta_1, self.beta_2, self.verdict_momentum = float(beta_1), float(beta_2), float(verdict_momentum)
        self.zeros, self.warmup_steps, self._warmup = zeros, warmup_steps, warmup
        self.orthogonalize, self.other_lr_ratio = orthogonalize, ratio
        self._newton_schulz = NewtonSchulz(int(ns_steps), tuple(map(float, ns_coefficients)))
        self._selection = Selection(orthogonalize, keywords, exclude_embeddings)
        self._matrices = _Opaque(())  # of each variable, once this is built
        self._backend = backend.current()
        self.workers: Any = self._backend.workers(self)
        self.vote: Any = None  # among several replicas a `signsgd_keras.vote.Vote`, once this is built

    @property
    def replicas(self) -> int:
        """How many replicas there are, on all workers."""
        return int(self.workers.count)

    @property
    def zero_rule(self) -> Zeros:
        """The zero rule in force."""
        return self.zeros or core.default_zeros(self.replicas)

    @property
    def ns_steps(self) -> int:
        """Newton–Schulz iterations."""
        return self._newton_schulz.steps

    @property
    def ns_coefficients(self) -> tuple[float, ...]:
        """The coefficients of each Newton–Schulz iteration."""
        return self._newton_schulz.coefficients

    @property
    def orthogonalized(self) -> list[str]:
        """The paths of the variables that are orthogonalized, once this is built."""
        return [path(v) for v in self._trainable_variables if self.slot(v).update.polar is not None]

    def build(self, variables: list[Variable]) -> None:
        """Create the momenta that the settings need.

        Args:
            variables: the model's trainable variables.
        """
        if self.built:
            return
        check_real(variables)
        self.workers.check_build(self.name)
        matrices = self._selection.matrices(variables)
        if self.replicas > 1:
            from .vote import vote_among  # needs TensorFlow, which alone has replicas

            self.vote = vote_among(self.workers)
            pairs = zip(variables, matrices, strict=True)
            slots = [Slot(v, {}, self._decay(v), self._update(matrix)) for v, matrix in pairs]
            self.vote.agree(slots, self._settings(), self.weight_decay)
        self._selection.check(variables, matrices)  # where workers agree, all of them fail
        super().build(variables)
        self._matrices = _Opaque(matrices)
        for entry in state.MOMENTA:
            needed = entry.needed(self)
            setattr(self, entry.attribute, self.add_optimizer_variables(variables, entry.name) if needed else None)

    def add_variable_from_reference(
        self, reference_variable: Variable, name: str | None = None, initializer: Any = "zeros"
    ) -> Variable:
        """Add an optimizer variable of a model variable's shape, of the kind that the table of the state says.

        Args:
            reference_variable: the model variable.
            name: of the entry, e.g. "momentum".
            initializer: of its value.
        """
        entry = state.named(name)
        if entry is None:
            return super().add_variable_from_reference(reference_variable, name, initializer)
        with keras.name_scope(self.name, caller=self):  # by caller: build() is in it already
            variable = state.create_like(self._backend, self.workers, entry, reference_variable, initializer)
        self._track_variable(variable)
        return variable

    def state_of(self, variable: Variable) -> tuple[Variable | None, Variable | None]:
        """Return the momentum and the verdict momentum of a variable, each None where the settings need none."""
        slot = self.slot(variable)
        return slot.momentum, slot.verdict_momentum

    def slot(self, variable: Variable) -> Slot:
        """Return a variable with its state, as a step needs it."""
        i = self._get_variable_index(variable)
        lists = {entry.name: getattr(self, entry.attribute) for entry in state.MOMENTA}
        found = {name: variables[i] for name, variables in lists.items() if variables is not None}
        return Slot(variable, found, self._decay(variable), self._update(self._matrices.values[i]))

    def update_step(self, gradient: Tensor, variable: Variable, learning_rate: Tensor) -> None:
        """Take one step of one variable without a vote: steps 1-8 with the worker's ballot for a verdict.

        Args:
            gradient: of the variable's shape.
            variable: `x`.
            learning_rate: `lr`.

        Raises:
            ValueError: among several replicas, where this would be no vote.
        """
        if self.replicas > 1:
            raise ValueError(
                f"update_step() is the step of one worker alone, and {self.name!r} votes among {self.replicas} "
                "replicas: call apply() of it, also from an optimizer around it"
            )
        slot, dense = self.slot(variable), self._backend.dense(gradient, variable)
        slot.step_alone(dense, self.zero_rule, self.iterations, learning_rate)

    def get_config(self) -> dict[str, Any]:
        """Return the settings, which make the same optimizer without its state."""
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "verdict_momentum": self.verdict_momentum,
            "zeros": self.zeros,
            "warmup_steps": self.warmup_steps,
            "orthogonalize": self.orthogonalize,
            "exclude_layers": list(self._selection.exclude_layers),
            "exclude_embeddings": self._selection.exclude_embeddings,
            "other_learning_rate": None,  # from a rate that changed since, and rounded, the ratio would be another
            "other_lr_ratio": self.other_lr_ratio if self.orthogonalize else None,
            "ns_steps": self.ns_steps,
            "ns_coefficients": list(self.ns_coefficients),
        }

    def save_own_variables(self, store: Any) -> None:
        """Write the state; of private variables the rows of all replicas."""
        saving.save(self, store)

    def load_own_variables(self, store: Any) -> None:
        """Read the state, also of another number of replicas, by the rule of `signsgd_core.redistribute`."""
        saving.load(self, store)

    def set_weights(self, weights: list[Any]) -> None:
        """Set the state; private variables from rows of all replicas, or from one value for all.

        Args:
            weights: of all variables, in their order.
        """
        if not self.built:
            super().set_weights(weights)  # says what is wrong
        saving.set_weights(self, [ops.convert_to_numpy(weight) for weight in weights])

    def _checkpoint_adapter(self, path: str) -> Any:
        """Make sure, before `tf.train.Checkpoint` restores anything, that it is a Signum's state."""
        origin.check_checkpoint(self, path)
        return super()._checkpoint_adapter(path)

    def _backend_apply_gradients(self, grads: list[Tensor], trainable_variables: list[Variable]) -> None:
        """Take a step with this replica's gradients: alone as Keras does, among several by a vote."""
        check_shapes(grads, trainable_variables)
        self.workers.check_step()
        if self.vote is None:
            if self.gradient_accumulation_steps or (self.use_ema and self.ema_overwrite_frequency):
                self.workers.check_condition()
            super()._backend_apply_gradients(grads, trainable_variables)
            return
        dense = [self._backend.dense(g, v) for g, v in zip(grads, trainable_variables, strict=True)]
        self.vote.meet(dense, [self._get_variable_index(v) for v in trainable_variables], self._step_together)

    def _apply_weight_decay(self, variables: list[Variable]) -> None:
        """Do nothing: step 8 decays."""

    def _step_together(self, gradients: Any, numbers: list[int]) -> None:
        """Do for all replicas, in cross-replica context, what Keras' `_backend_apply_gradients` does for one."""
        steps, accumulation = self.gradient_accumulation_steps, None
        if steps:
            is_last = ops.equal((self._iterations + 1) % steps, 0)
            accumulation = Accumulation(steps, is_last, self._accumulated_gradients, numbers)
        self.vote.step(
            StepInput(
                gradients=gradients,
                slots=[self.slot(self._trainable_variables[k]) for k in numbers],
                clip=self._clip_gradients,
                zeros=self.zero_rule,
                step=self.iterations,
                learning_rate=ops.convert_to_tensor(self.learning_rate),
                weight_decay=self.weight_decay,
                settings=self._settings(),
                ballot_bytes=sum(self.slot(v).ballot_bytes for v in self._trainable_variables),
                accumulation=accumulation,
            )
        )
        if self.use_ema:
            self._update_model_variables_moving_average(self._trainable_variables)
            if self.ema_overwrite_frequency:
                ops.cond(
                    ops.equal((self.iterations + 1) % self.ema_overwrite_frequency, 0),
                    lambda: self._overwrite_model_variables_with_average_value(self._trainable_variables),
                    lambda: None,
                )

    def _update(self, matrix: Matrices | None) -> Update:
        """Return the formulas, by the settings now, of a variable that is orthogonalized as a matrix or is not."""
        polar = None if matrix is None else Polar(matrix, self._newton_schulz)
        rate = self.other_lr_ratio if matrix is None else 1.0
        return Update(self.beta_1, self.beta_2, self.verdict_momentum, self._warmup, self._backend, polar, rate)

    def _decay(self, variable: Variable) -> float:
        """Return λ of a variable, 0 where it is excluded from weight decay."""
        return self.weight_decay if self.weight_decay and self._use_weight_decay(variable) else 0.0

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in AGREED}


class _Opaque:
    """Values that Keras and TensorFlow do not look into for variables, as they do into lists."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values
