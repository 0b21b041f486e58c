"""Variables as one flat vector, and back."""

import numpy as np
import tensorflow as tf


class Packing:
    """Packs the variables of one replica into a flat vector and back.

    Args:
        strategy: A `SwarmStrategy`.
        variables: Float `keras.Variable`s that were made in its scope; may be empty.
        dtype: The `tf.DType` of the vector.

    Attributes:
        sizes: The number of elements of each variable, in order.
        size: Their sum.
        num_bytes: The bytes of the vector.
        variables: The `tf.Variable`s of each local replica.
    """

    def __init__(self, strategy, variables, dtype):
        self._dtype = dtype
        self.sizes = tuple(int(tf.size(v.value)) for v in variables)
        self.size = sum(self.sizes)
        self.num_bytes = self.size * dtype.size
        self.variables = list(
            zip(*(strategy.experimental_local_results(v.value) for v in variables))
        )

    def tensor_ids(self):
        """Returns the number of the variable that each element belongs to, [size].

        It has the smallest type that holds all numbers.
        """
        numbers = np.arange(len(self.sizes), dtype=np.min_scalar_type(len(self.sizes)))
        return tf.constant(np.repeat(numbers, self.sizes))

    def pack(self, replica):
        """Returns the replica's variables as one vector, [size]."""
        if not self.size:
            return tf.zeros([0], self._dtype)
        return tf.concat(
            [
                tf.cast(tf.reshape(variable, [-1]), self._dtype)
                for variable in self.variables[replica]
            ],
            axis=0,
        )

    def unpack(self, replica, vector):
        """Assigns a vector, [size], to the replica's variables."""
        if not self.size:
            return
        for variable, part in zip(
            self.variables[replica], tf.split(vector, self.sizes)
        ):
            variable.assign(tf.cast(tf.reshape(part, variable.shape), variable.dtype))
