"""Functions of whole vectors, compiled by XLA."""

import functools

import tensorflow as tf


def compiled(function):
    """Returns a function of nests of tensors that returns a tensor, compiled by XLA."""
    in_place = compiled_in_place(lambda _, *args: ((), function(*args)))
    return functools.partial(in_place, ())


def compiled_in_place(function):
    """Returns a function that changes variables, and that XLA compiles.

    What it computes for a variable goes into the memory that this has, or where another
    one takes over what this had, into that one's; unless somebody else has that value,
    too. What it only hands on, or also returns, is left to TensorFlow, as XLA would
    copy it.

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
        flat, given = tf.nest.flatten(variables), tf.nest.flatten(args)
        old = [variable.read_value() for variable in flat]
        new, result = function(tf.nest.pack_sequence_as(variables, old), *args)
        new, after = tf.nest.flatten(new), list(old)
        heirs = {_place(value, old): place for place, value in enumerate(new)}
        for place, value in enumerate(new):
            if _place(value, [*given, *old]) is None:
                free = place
                while free in heirs:
                    free = heirs[free]
                if free != place or value is not result:
                    flat[free].assign(value)
                    after[free] = value
        is_known = _place(result, [*given, *after]) is not None
        outputs = [] if is_known else [result]
        tensors = [*given, *outputs, *after]
        sources = [_place(value, tensors) for value in new]
        result_source = _place(result, tensors)
        return outputs

    def call(variables, *args):
        outputs = compute(variables, args)
        flat = tf.nest.flatten(variables)
        after = [variable.read_value() for variable in flat]
        tensors = [*tf.nest.flatten(args), *outputs, *after]
        for variable, value, source in zip(flat, after, sources):
            if tensors[source] is not value:
                variable.assign(tensors[source])
        return tensors[result_source]

    return call


def _place(value, tensors):
    """Returns where a tensor itself is in a list, `None` if it is not."""
    places = [number for number, tensor in enumerate(tensors) if tensor is value]
    return places[0] if places else None
