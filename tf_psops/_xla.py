"""Functions of whole vectors, compiled by XLA."""

import tensorflow as tf


def compiled(function):
    """Returns a function of nests of tensors as XLA compiles it.

    What it only hands on, or gives twice, is left to TensorFlow: XLA would copy it.
    """
    places = None

    @tf.function(jit_compile=True, autograph=False)
    def compute(args):
        nonlocal places
        tensors = tf.nest.flatten(args)
        num_given = len(tensors)

        def place(result):
            for number, tensor in enumerate(tensors):
                if tensor is result:
                    return number
            tensors.append(result)
            return len(tensors) - 1

        places = tf.nest.map_structure(place, function(*args))
        return tensors[num_given:]

    def call(*args):
        computed = compute(args)
        tensors = [*tf.nest.flatten(args), *computed]
        return tf.nest.map_structure(tensors.__getitem__, places)

    return call
