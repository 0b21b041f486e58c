"""Lets a replica that a batch leaves without rows train.

All convolutions and max-pooling of Keras, by layers and by `keras.ops`, come to
functions of `keras.src.backend.tensorflow.nn`, which are replaced, and so is the `call`
of `keras.layers.BatchNormalization`.
"""

import functools

import keras
import tensorflow as tf
from keras.src.backend.tensorflow import nn

from tf_psops.tensorflow_internals import swarm_extended


def _may_lack_rows(inputs):
    extended = swarm_extended.of_replica()
    unknown = isinstance(inputs, tf.Tensor) and inputs.shape[0] in (None, 0)
    return unknown and extended is not None and extended._num_replicas_in_sync > 1


def _padded(value):
    """Returns a tensor with a row of zeros if it has none.

    Where there are rows, neither `tf.pad` nor `tf.slice` copies anything; `tf.cond`
    took a third of a step.
    """
    rows, *others = tf.unstack(tf.shape(value))
    padding = [[0, tf.maximum(1 - rows, 0)], *([0, 0] for _ in others)]
    return tf.ensure_shape(tf.pad(value, padding), [None, *value.shape[1:]])


def _of_rows(value, rows):
    """Returns the first rows of a tensor."""
    sizes = [rows, *tf.unstack(tf.shape(value))[1:]]
    first = tf.slice(value, [0] * len(sizes), sizes)
    return tf.ensure_shape(first, [None, *value.shape[1:]])


def _never_without_rows(function):
    """Gives a function that has no rows one of zeros, which reaches nothing.

    On CPUs oneDNN gives a convolution of no rows the shape of what went in, and ends
    the process at the gradient of max-pooling no rows.
    """

    @functools.wraps(function)
    def call(inputs, *args, **kwargs):
        if not _may_lack_rows(inputs):
            return function(inputs, *args, **kwargs)
        outputs = function(_padded(inputs), *args, **kwargs)
        return _of_rows(outputs, tf.shape(inputs)[0])

    return call


for _name in ("conv", "separable_conv", "max_pool"):
    setattr(nn, _name, _never_without_rows(getattr(nn, _name)))


def _keeping_moments(call):
    """Lets no rows leave moving moments as they are: theirs are none."""

    @functools.wraps(call)
    def normalize(self, inputs, training=None, mask=None):
        # Synchronised moments are those of all replicas, which may have rows.
        moves = training and self.trainable and not self.synchronized
        if not (moves and _may_lack_rows(inputs)):
            return call(self, inputs, training=training, mask=mask)
        rows = tf.shape(inputs)[0]
        moments = self.moving_mean, self.moving_variance
        before = [tf.identity(moment.value) for moment in moments]
        mask = None if mask is None else _padded(mask)
        outputs = call(self, _padded(inputs), training=training, mask=mask)
        for moment, value in zip(moments, before):
            moment.assign(tf.where(rows > 0, moment.value, value))
        return _of_rows(outputs, rows)

    return normalize


_Normalization = keras.layers.BatchNormalization
_Normalization.call = _keeping_moments(_Normalization.call)
