"""Random numbers that depend on a seed and counters alone, on every device."""

import tensorflow as tf


def key(seed, *counters):
    """Returns a key, int64 [2], that depends on a seed and counters alone.

    Args:
        seed: A Python int.
        *counters: Scalar ints or int tensors, such as the number of a synchronisation.
    """
    made = tf.constant([seed % 2**63, 0x5350534F], tf.int64)
    for counter in counters:
        made = tf.random.experimental.stateless_fold_in(made, counter, alg="philox")
    return made


def uniform(shape, key):
    """Returns floats from U(0, 1), in steps of 2**-24, that depend on `key` alone.

    They are drawn as whole numbers: XLA makes other floats of the same random bits.

    Args:
        shape: A list of ints.
        key: What `key` returns.
    """
    draws = tf.random.stateless_uniform(shape, key, 0, 2**24, tf.int32, alg="philox")
    return tf.cast(draws, tf.float32) / 2**24
