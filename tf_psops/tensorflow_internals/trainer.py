"""Keras' trainer: what it draws, builds, compiles and reports of a model.

`TensorFlowTrainer.predict` and `_maybe_symbolic_build` are where Keras decides which
rows a model predicts, and draws a batch to build it; `_get_metrics_result_or_logs`
where it decides what the history says. Its `jit_compile` knows what XLA cannot compile,
but not of several devices. `fit` tells its callbacks nothing of an exception.
"""

import functools

import keras
import tensorflow as tf
from absl import logging
from keras.src.backend.tensorflow import trainer as tensorflow_trainer
from tensorflow.python.distribute import values

from tf_psops.tensorflow_internals import swarm_extended
from tf_psops.transport import membership


def _predict_every_row(predict):
    """Lets each worker of a swarm predict all rows, instead of its share of them."""

    @functools.wraps(predict)
    def predict_every_row(self, *args, **kwargs):
        if not swarm_extended.of(self.distribute_strategy):
            return predict(self, *args, **kwargs)
        token = swarm_extended.every_row.set(True)
        try:
            return predict(self, *args, **kwargs)
        finally:
            swarm_extended.every_row.reset(token)

    return predict_every_row


def _build_without_data(maybe_symbolic_build):
    """Tells a model of a swarm the shapes of its batches without drawing one.

    Keras would draw a batch from an iterator that it then drops, and with it what that
    has read ahead of a generator, and one round of a shuffle. A model without `call`,
    such as a GAN, is not built, as Keras does it without a strategy.
    """

    @functools.wraps(maybe_symbolic_build)
    def build(self, iterator=None, data_batch=None):
        if swarm_extended.of(self.distribute_strategy):
            _check_trained(self)
            if type(self).call is keras.Model.call:
                if self.optimizer is not None and not self.optimizer.built:
                    with self.distribute_strategy.scope():
                        self.optimizer.build(self.trainable_variables)
                return
            if iterator is not None:
                data_batch = _known_batch(iterator)
            if data_batch is not None:
                iterator = None
        maybe_symbolic_build(self, iterator=iterator, data_batch=data_batch)

    return build


def _check_trained(model):
    """Raises a `ValueError` before an optimizer is built that cannot train a model."""
    if model.optimizer is None or model.optimizer.built:
        return
    for variable in model.optimizer.variables:
        owner = getattr(variable.value, "distribute_strategy", None)
        if owner is not model.distribute_strategy:
            where = "outside of it" if owner is None else f"under {owner!r}"
            raise ValueError(
                "A swarm needs an optimizer made in the scope of its SwarmStrategy. "
                f"Received: {type(model.optimizer).__name__}, made {where}, to train "
                f"model {model.name!r}. Make the optimizer, and compile the model, "
                "inside `with strategy.scope():` of one strategy."
            )
    for variable in model.trainable_variables:
        owner = getattr(variable.value, "distribute_strategy", None)
        if owner is not model.distribute_strategy:
            raise ValueError(
                "A swarm cannot train a variable that was not made in the scope of its "
                f"SwarmStrategy. Received: {variable.path!r} of model {model.name!r}. "
                "Make it inside `with strategy.scope():` (also what `enable_lora` and "
                "the like add to a layer), or set `trainable = False` on its layer."
            )


def _known_batch(iterator):
    """Returns what has the shapes and types of the batches of a Keras iterator.

    `None` if they are only known once a batch is drawn.
    """
    specs = tf.nest.map_structure(
        _first_spec, iterator._distributed_dataset.element_spec
    )
    shapes = [spec.shape for spec in tf.nest.flatten(specs) if spec is not None]
    if all(shape.rank is not None and None not in shape[1:] for shape in shapes):
        return specs
    # Those that Keras has drawn of a generator, and will hand out.
    batches = getattr(iterator.data_adapter, "_first_batches", None)
    return batches[0] if batches else None


def _first_spec(spec):
    """Returns the shape and type of the first replica's value, `None` without one."""
    if isinstance(spec, values.PerReplicaSpec):
        (spec, *_) = spec._value_specs
    return spec if hasattr(spec, "shape") else None


def _predict_split_batch(predict_on_batch):
    """Splits a batch over the local devices, where Keras hands all of it to each."""

    @functools.wraps(predict_on_batch)
    def predict_split_batch(self, x):
        extended = swarm_extended.of(self.distribute_strategy)
        if extended and len(extended.worker_devices) > 1:
            x = keras.tree.map_structure(extended.split, x)
        return predict_on_batch(self, x)

    return predict_split_batch


def _of_all_workers(result_or_logs):
    """Lets what a step returns beside metrics be the mean over all workers.

    Keras makes it the mean over the local devices. Metrics ask the others anyway.
    """

    @functools.wraps(result_or_logs)
    def get(self, logs):
        result = result_or_logs(self, logs)
        if result is logs and swarm_extended.of(self.distribute_strategy):
            return self.distribute_strategy.mean_of_logs(logs)
        return result

    return get


def _set_jit_compile(self, value):
    """Goes on without XLA where it cannot compile, as Keras does for some layers."""
    extended = swarm_extended.of(self.distribute_strategy)
    if value and extended and not extended.supports_jit:
        logging.warning(
            "XLA cannot compile the steps of several devices of one process, nor "
            "gradients that processes share. Received: jit_compile=%s with %d local "
            "devices. Model %r goes on with jit_compile=False. For XLA, start a "
            "process for each particle.",
            value,
            len(extended.worker_devices),
            self.name,
        )
        value = False
    _jit_compile.fset(self, value)


_Trainer = tensorflow_trainer.TensorFlowTrainer
_Trainer._get_metrics_result_or_logs = _of_all_workers(
    _Trainer._get_metrics_result_or_logs
)
_jit_compile = _Trainer.jit_compile
_Trainer.jit_compile = _jit_compile.setter(_set_jit_compile)
_Trainer.predict_on_batch = _predict_split_batch(_Trainer.predict_on_batch)
_Trainer.predict = _predict_every_row(_Trainer.predict)
_Trainer._maybe_symbolic_build = _build_without_data(_Trainer._maybe_symbolic_build)


@functools.cache
def join_failures():
    """Makes `fit` tell the other workers of an exception that ends it on this one.

    And begin again, to join them, where they have gone on without this worker. Keras
    tells its callbacks nothing of an exception, and hands `fit` itself to none of them
    before it runs: the method of the class has to be replaced.
    """
    fit = keras.Model.fit

    @functools.wraps(fit)
    def fit_or_tell(self, *args, **kwargs):
        strategy = self.distribute_strategy
        group = strategy.peers if swarm_extended.of(strategy) else None
        if group is None:
            return fit(self, *args, **kwargs)
        strategy.num_fits += 1
        while True:
            try:
                return fit(self, *args, **kwargs)
            except membership.DroppedError as error:
                if not group.come_back():
                    if end_in_backup := strategy.end_in_backup():
                        end_in_backup()
                    raise
                logging.warning("%s It joins them again.", error)
            except BaseException as error:
                if not getattr(error, "is_known_to_all", False):
                    text = " ".join(f"{type(error).__name__}: {error}".split())
                    group.end(f"Worker {group.index} left `fit` with {text[:1000]}")
                raise

    keras.Model.fit = fit_or_tell


def known_to_all(error):
    """Returns an exception that all workers raise: nobody need be told of it."""
    error.is_known_to_all = True
    return error
