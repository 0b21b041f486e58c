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


def _never_without_rows(function):
    """Gives a function that has no rows one of zeros, which reaches nothing.

    On CPUs oneDNN gives a convolution of no rows the shape of what went in, and ends
    the process at the gradient of max-pooling no rows.
    """

    @functools.wraps(function)
    def call(inputs, *args, **kwargs):
        if not _may_lack_rows(inputs):
            return function(inputs, *args, **kwargs)
        rows, *sizes = tf.unstack(tf.shape(inputs))

        def of_none():
            row = tf.zeros([1, *sizes], inputs.dtype)
            row.set_shape([1, *inputs.shape[1:]])
            return function(row, *args, **kwargs)[:0]

        return tf.cond(rows > 0, lambda: function(inputs, *args, **kwargs), of_none)

    return call


for _name in ("conv", "separable_conv", "max_pool"):
    setattr(nn, _name, _never_without_rows(getattr(nn, _name)))


def _without_moments(call):
    """Lets no rows be normalised as they are in evaluation: they have no moments."""

    @functools.wraps(call)
    def normalize(self, inputs, training=None, mask=None):
        def normalized(training):
            return call(self, inputs, training=training, mask=mask)

        # Synchronised moments are those of all replicas, which all have to ask.
        moves = training and self.trainable and not self.synchronized
        if not (moves and _may_lack_rows(inputs)):
            return normalized(training)
        return tf.cond(
            tf.shape(inputs)[0] > 0, lambda: normalized(True), lambda: normalized(False)
        )

    return normalize


_Normalization = keras.layers.BatchNormalization
_Normalization.call = _without_moments(_Normalization.call)
