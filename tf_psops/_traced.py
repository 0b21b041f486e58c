"""Functions that TensorFlow runs, traced once."""

import functools

import tensorflow as tf

from tf_psops import tensorflow_internals


def once(method):
    """Makes a method a graph, of which each object has one.

    It has one for each value of those arguments that are no tensors. Tensors must have
    the same nesting, shapes and types in all calls: a `tf.function` looks at all of
    that again, which takes longer than what a synchronisation of a small model runs.
    """
    function = tf.function(method, autograph=False)
    name = f"_graphs_of_{method.__name__}"

    @functools.wraps(method)
    def call(self, *args):
        graphs = vars(self).setdefault(name, {})
        flat = tf.nest.flatten(args)
        tensors = [value for value in flat if isinstance(value, tf.Tensor)]
        others = tuple(value for value in flat if not isinstance(value, tf.Tensor))
        if others not in graphs:
            bound = function.__get__(self, type(self))
            graphs[others] = bound.get_concrete_function(*args)
        return tensorflow_internals.call_traced(graphs[others], tensors)

    return call
