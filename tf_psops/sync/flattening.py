"""Variables as one flat vector, and back."""

import numpy as np
import tensorflow as tf

_ALIGNMENT = (
    64  # Bytes; a part of a vector that begins and ends there shares its memory.
)


class Flattening:
    """Packs the variables of one replica into a flat vector and back.

    Those come first whose parts of the vector TensorFlow can assign without a copy.

    Args:
        strategy: A `SwarmStrategy`.
        variables: Float `tf.Variable`s that were made in its scope; may be empty.
        dtype: The `tf.DType` of the vector.

    Attributes:
        size: The number of elements of all variables.
        num_bytes: The bytes of the vector.
        variables: The `tf.Variable`s of each local replica, in the vector's order.
        order: The variables given, in the vector's order.
    """

    def __init__(self, strategy, variables, dtype):
        self._dtype = dtype
        sizes = [v.shape.num_elements() for v in variables]
        copied = [size * dtype.size % _ALIGNMENT > 0 for size in sizes]
        self._order = np.argsort(copied, kind="stable")
        self._sizes = np.array(sizes, int)[self._order]
        self._num_shared = copied.count(False)
        self.size = sum(sizes)
        self.num_bytes = self.size * dtype.size
        self.order = [variables[number] for number in self._order]
        copies = list(zip(*map(strategy.experimental_local_results, self.order)))
        self.variables = copies or [()] * len(strategy.extended.worker_devices)

    def tensor_ids(self):
        """Returns the number of the variable that each element belongs to, [size].

        It has the smallest type that holds all numbers.
        """
        dtype = np.min_scalar_type(len(self._order))
        return tf.constant(np.repeat(self._order.astype(dtype), self._sizes))

    def pack(self, replica):
        """Returns the replica's variables as one vector, [size]."""
        return self.join(self.variables[replica] if self.size else [])

    def join(self, values):
        """Returns tensors in the places of `order` as one vector, [size]."""
        if not self.size:
            return tf.zeros([0], self._dtype)
        flat = [tf.cast(tf.reshape(value, [-1]), self._dtype) for value in values]
        return tf.concat(flat, axis=0)

    def unpack(self, replica, vector):
        """Assigns a vector, [size], to the replica's variables."""
        if not self.size:
            return
        for variable, part in zip(
            self.variables[replica], self.cut(vector), strict=True
        ):
            variable.assign(part)

    def unpack_unless_set(self, replica, vector, shown):
        """Does so but for variables that no longer have the values of `shown`."""
        if not self.size:
            return
        for variable, part, before in zip(
            self.variables[replica], self.cut(vector), self.cut(shown), strict=True
        ):
            now = variable.read_value()
            both_nan = tf.math.is_nan(now) & tf.math.is_nan(before)
            same = tf.equal(now, before) | both_nan
            variable.assign(tf.where(tf.reduce_all(same), part, now))

    def cut(self, vector):
        """Returns the parts of a vector, [size], as tensors like those of `order`."""
        # Apart, because TensorFlow copies all parts if it has to copy one of them.
        shared, copied = np.split(self._sizes, [self._num_shared])
        middle = shared.sum()
        parts = [*_cut(vector[:middle], shared), *_cut(vector[middle:], copied)]
        return [
            tf.cast(tf.reshape(part, variable.shape), variable.dtype)
            for variable, part in zip(self.order, parts, strict=True)
        ]


class Joined:
    """Packs what several others pack into one vector.

    Args:
        *parts: What can do what a `Flattening` can.

    Attributes:
        size: The number of elements of all.
        num_bytes: The bytes of the vector.
        variables: A nest of the `tf.Variable`s of all.
    """

    def __init__(self, *parts):
        self._parts = parts
        self.size = sum(part.size for part in parts)
        self.num_bytes = sum(part.num_bytes for part in parts)
        self.variables = [part.variables for part in parts]

    def pack(self, replica):
        """Returns all as one vector, [size]."""
        return tf.concat([part.pack(replica) for part in self._parts], axis=0)

    def unpack(self, replica, vector):
        """Gives each its part of a vector, [size]."""
        pieces = tf.split(vector, [part.size for part in self._parts])
        for part, piece in zip(self._parts, pieces):
            part.unpack(replica, piece)


def _cut(vector, sizes):
    return tf.split(vector, sizes) if len(sizes) else []
