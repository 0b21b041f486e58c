"""Functions of whole vectors, compiled by XLA."""

import functools

import tensorflow as tf


def compiled(function):
    """Returns a function of nests of tensors that returns a tensor, compiled by XLA."""
    in_place = compiled_in_place(lambda _, *args: ((), function(*args)))
    return functools.partial(in_place, ())


def compiled_in_place(function):
    """Returns a function that changes variables, and that XLA compiles.

    What it computes for a variable goes into the memory that this has, unless somebody
    else has its value, too. What it only hands on, or also returns, is left to
    TensorFlow: XLA would copy it.

    Args:
        function: A function of the values of the variables, a nest, and of nests of
            tensors. It returns the variables' new values, and a tensor.

    Returns:
        A function of the variables and of the nests, which returns that tensor.
    """
    sources = result_source = None

    @tf.function(jit_compile=True, autograph=False)
    def compute(variables, args):
        nonlocal sources, result_source
        flat = tf.nest.flatten(variables)
        old = [variable.read_value() for variable in flat]
        new, result = function(tf.nest.pack_sequence_as(variables, old), *args)
        given = tf.nest.flatten(args)
        result_source = _place(result, given)
        if result_source is None:
            result_source = len(given)
            given.append(result)
        sources = [_place(value, given) for value in tf.nest.flatten(new)]
        for variable, before, after, source in zip(
            flat, old, tf.nest.flatten(new), sources
        ):
            if source is None and after is not before:
                variable.assign(after)
        return given[len(tf.nest.flatten(args)) :]

    def call(variables, *args):
        computed = compute(variables, args)
        tensors = [*tf.nest.flatten(args), *computed]
        for variable, source in zip(tf.nest.flatten(variables), sources):
            if source is not None:
                variable.assign(tensors[source])
        return tensors[result_source]

    return call


def _place(value, tensors):
    """Returns where a tensor itself is in a list, `None` if it is not."""
    places = [number for number, tensor in enumerate(tensors) if tensor is value]
    return places[0] if places else None
