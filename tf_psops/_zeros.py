"""Zeros that are in memory only while they are needed."""

import tensorflow as tf


def like(vector):
    """Returns zeros of the shape and type of a tensor or variable.

    Of `tf.zeros_like` in a graph TensorFlow makes a constant, and keeps it.
    """
    return tf.raw_ops.Empty(shape=vector.shape, dtype=vector.dtype, init=True)
