"""Lets particles share how large the second moments of their gradients are."""

import numpy as np
import tensorflow as tf

_LARGEST_FACTOR = 1e20


class SecondMoments:
    """Packs the means of each row and column of second moments, and rescales by them.

    It does for them what a `Flattening` does for variables. Seen as a matrix with a
    column for each output, second moments are nearly the product of the means of their
    rows and columns (Adafactor, Shazeer & Stern, arXiv 1804.04235), some hundredth as
    many numbers. It is in these that particles of unlike data differ: an input or an
    output that the data of one hardly use has small moments there, and so Adam makes a
    long step of a small gradient.

    Args:
        strategy: A `SwarmStrategy`.
        slots: Float `tf.Variable`s that hold second moments; may be none.
        dtype: The `tf.DType` of the vector.

    Attributes:
        size: The number of rows and columns of all.
        num_bytes: The bytes of the vector.
        variables: The `tf.Variable`s of each local replica.
    """

    def __init__(self, strategy, slots, dtype):
        self._dtype = dtype
        shapes = [tuple(slot.shape) for slot in slots]
        # A vector is a matrix of one column: then the product is exact.
        self._columns = [shape[-1] if len(shape) > 1 else 1 for shape in shapes]
        self._rows = [
            int(np.prod(shape)) // columns
            for shape, columns in zip(shapes, self._columns)
        ]
        self.size = sum(self._rows) + sum(self._columns)
        self.num_bytes = self.size * dtype.size
        local = strategy.experimental_local_results
        self.variables = list(zip(*(local(slot) for slot in slots)))

    def pack(self, replica):
        """Returns the means of all rows and columns of the replica, [size]."""
        means = [tf.zeros([0], self._dtype)]
        for matrix in self._matrices(replica):
            means += [tf.reduce_mean(matrix, axis=1), tf.reduce_mean(matrix, axis=0)]
        return tf.concat(means, axis=0)

    def unpack(self, replica, vector):
        """Rescales the replica's second moments to other means, [size]."""
        sizes = [n for both in zip(self._rows, self._columns) for n in both]
        parts = tf.split(vector, sizes) if sizes else []
        variables = self.variables[replica] if self.variables else ()
        for variable, matrix, rows, columns in zip(
            variables, self._matrices(replica), parts[::2], parts[1::2], strict=True
        ):
            expected = _product(rows, columns)
            own = _product(
                tf.reduce_mean(matrix, axis=1), tf.reduce_mean(matrix, axis=0)
            )
            known = expected < _LARGEST_FACTOR * own  # Not 0, nor NaN.
            scaled = tf.where(known, matrix * (expected / own), expected)
            scaled = tf.cast(tf.reshape(scaled, variable.shape), variable.dtype)
            variable.assign(scaled)

    def _matrices(self, replica):
        variables = self.variables[replica] if self.variables else ()
        return [
            tf.cast(tf.reshape(variable, [rows, columns]), self._dtype)
            for variable, rows, columns in zip(variables, self._rows, self._columns)
        ]


def _product(rows, columns):
    """Returns the matrix of these means of rows and columns that is of rank one."""
    # Not in one product, which may underflow.
    shares = tf.math.divide_no_nan(rows, tf.reduce_mean(rows))
    return shares[:, tf.newaxis] * columns
