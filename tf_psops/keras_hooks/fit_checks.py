"""Checks of what `PSOSync` finds when `fit` begins."""

import keras

from tf_psops import strategy as strategy_lib
from tf_psops import tensorflow_internals


def check_strategy(model):
    """Raises a `ValueError` unless a model was made under a `SwarmStrategy`."""
    strategy = model.distribute_strategy
    if not isinstance(strategy, strategy_lib.SwarmStrategy):
        raise ValueError(
            "PSOSync needs a model made and compiled in the scope of a "
            "`tf_psops.SwarmStrategy`. Received a model under "
            f"{type(strategy).__name__}. Write `strategy = "
            "tf_psops.SwarmStrategy()` (or SwarmStrategy.in_process(4)), and make "
            "and compile the model inside `with strategy.scope():`."
        )


def check_callbacks(callbacks, sync_class):
    """Raises a `ValueError` if a callback of `fit` does not fit the others.

    Args:
        callbacks: All callbacks of this `fit`.
        sync_class: The class `PSOSync`, of which there must not be two.
    """
    num_syncs = sum(isinstance(callback, sync_class) for callback in callbacks)
    if num_syncs > 1:
        raise ValueError(
            f"One `fit` cannot have more than one PSOSync. Received: {num_syncs} "
            "in `callbacks`. Keep one of them."
        )
    for callback in callbacks:
        if isinstance(callback, keras.callbacks.BackupAndRestore):
            raise ValueError(
                "Keras' BackupAndRestore keeps one particle, not the swarm. "
                f"Received: {callback!r} in `callbacks`. Leave it out, and use "
                "`PSOSync(backup_dir=...)`."
            )


def check_multiples(steps_per_execution, **arguments):
    """Raises a `ValueError` unless numbers of steps end with an execution.

    Args:
        steps_per_execution: The steps that Keras runs at a time.
        **arguments: The numbers of steps, as name=value.
    """
    for name, steps in arguments.items():
        if steps % steps_per_execution:
            raise ValueError(
                f"{name}={steps} is not a multiple of steps_per_execution="
                f"{steps_per_execution}: Keras runs {steps_per_execution} steps at a "
                f"time, so the end of {steps} steps cannot be hit. Choose `{name}` as "
                "a multiple of `steps_per_execution`."
            )


def check_scope(model):
    """Raises a `ValueError` unless all of a model was made in its strategy's scope."""
    optimizer = model.optimizer
    if optimizer is None:
        raise ValueError(
            "PSOSync needs a model with an optimizer. Received: optimizer=None. "
            "Compile the model with one, inside `with strategy.scope():`."
        )
    loss_tracker, *metrics = tensorflow_internals.means(model)
    # `optimizer.iterations` is no variable where gradients accumulate.
    made = {
        "a model": model.trainable_variables,
        "an optimizer": optimizer.variables[:1],
        "a loss": loss_tracker.variables,
        "a metric": [v for metric in metrics for v in metric.variables],
    }
    names = {"a model": model.name, "an optimizer": type(optimizer).__name__}
    for what, variables in made.items():
        for variable in variables:
            owner = getattr(variable.value, "distribute_strategy", None)
            if owner is not model.distribute_strategy:
                where = "outside of it" if owner is None else f"under {owner!r}"
                raise ValueError(
                    f"PSOSync needs {what} made in the scope of the SwarmStrategy. "
                    f"Received: {names.get(what, variable.path)}, made {where}. "
                    "Make the model and the optimizer, and compile the model, "
                    "inside `with strategy.scope():` of one strategy."
                )


def settings(model):
    """Returns what of a model has to be the same on all workers."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    return {
        "model": [(v.name, tuple(v.shape), v.dtype) for v in model.weights],
        "number of trainable weights": len(model.trainable_weights),
        "optimizer": (
            type(optimizer).__name__,
            [(tuple(v.shape), v.dtype) for v in optimizer.variables],
        ),
        "local particles": len(model.distribute_strategy.extended.worker_devices),
    }
