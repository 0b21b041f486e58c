"""Variables of which each replica has a copy of its own.

`values.SyncOnReadVariable` is TensorFlow's class of such a variable; the public API
makes them, and names no class.
"""

import contextlib

import numpy as np
import tensorflow as tf
from tensorflow.python.distribute import values

_SEED_STRIDE = 1_000_003


class SwarmVariable(values.SyncOnReadVariable):
    """A copy for each replica, with all that plain TensorFlow's variables can do.

    The base class refuses to write to single rows, as optimizers do with the sparse
    gradients of an embedding, and to be a Python number. And word goes out of what is
    set outside of the replicas, where a user's code, such as a callback, gives all
    local copies one value.

    Attributes:
        watchers: Objects whose `note_set(variable)` is called after that; held weakly.
    """

    def assign(self, *args, **kwargs):
        return self._told(super().assign(*args, **kwargs))

    def assign_add(self, *args, **kwargs):
        return self._told(super().assign_add(*args, **kwargs))

    def assign_sub(self, *args, **kwargs):
        return self._told(super().assign_sub(*args, **kwargs))

    def _told(self, result):
        replica = tf.distribute.get_replica_context()
        inside = replica is not None and replica.strategy is self.distribute_strategy
        if not inside and tf.executing_eagerly():
            for watcher in list(self.watchers):
                watcher.note_set(self)
        return result

    def __float__(self):
        return float(self.numpy())

    def __int__(self):
        return int(self.numpy())

    def __complex__(self):
        return complex(self.numpy())

    def __bool__(self):
        return bool(self.numpy())

    def __array__(self, dtype=None):
        return np.asarray(self.numpy(), dtype=dtype)


def _scattering(method):
    """Makes a method that writes to a replica's copy; outside of replicas to all."""

    def scatter(self, value, *args, **kwargs):
        def write(variable, value):
            return getattr(variable, method)(value, *args, **kwargs)

        return self._told(self._update(write, value))

    return scatter


for _method in (
    "scatter_add",
    "scatter_sub",
    "scatter_mul",
    "scatter_div",
    "scatter_min",
    "scatter_max",
    "scatter_update",
    "scatter_nd_add",
    "scatter_nd_sub",
    "scatter_nd_update",
    "batch_scatter_update",
):
    setattr(SwarmVariable, _method, _scattering(_method))


def is_seed(name):
    """Tells by its name whether a variable is the state of a random generator."""
    return "seed_generator_state" in name


def move_seed(seed, places):
    """Returns a random seed so many replicas further on."""
    offset = tf.constant([places * _SEED_STRIDE % 0x7FFFFFFF, 0], tf.int64)
    return tf.cast(tf.cast(seed, tf.int64) + offset, seed.dtype)


@contextlib.contextmanager
def outside_of_graphs(arguments):
    """Makes a variable have its value at once, also while a function is traced.

    TensorFlow would set it when the function is first called, too late to be shared.

    Args:
        arguments: Those of the variable; a constant of the graph becomes an array.
    """
    value = arguments.get("initial_value")
    if tf.is_tensor(value) and tf.is_symbolic_tensor(value):
        value = tf.get_static_value(value)
        if value is None:  # It is computed in the graph.
            yield
            return
        arguments["initial_value"] = value
    with tf.init_scope():
        yield
