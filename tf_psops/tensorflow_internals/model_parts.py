"""What a model consists of: its variables, optimizers and metrics, wherever they hang.

`auto_control_deps_utils.get_read_write_resource_inputs` alone tells which variables a
traced function writes, through all functions that it calls.
"""

import collections
import contextlib
import contextvars
import functools
import types

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.framework import auto_control_deps_utils

# What a model holds that is not its own: other models that share a layer, all variables
# of the scope, the arrays of a training that was cut short.
_NOT_ITS_OWN = frozenset(
    {
        "_inbound_nodes",
        "_outbound_nodes",
        "_nodes",
        "_nodes_by_depth",
        "_eval_epoch_iterator",
        "_swarm_synchronizer",
    }
)
_HOLDS_NONE = (
    str,
    bytes,
    int,
    float,
    type(None),
    type,
    np.ndarray,
    np.generic,
    tf.Tensor,
    tf.Graph,
    tf.data.Dataset,
    tf.distribute.Strategy,
    types.ModuleType,
    types.FunctionType,
    keras.KerasTensor,
    keras.callbacks.Callback,
)


def reached(model):
    """Returns all objects that a model holds, through attributes and containers.

    Keras' own lists do not name the optimizers, metrics and variables that are a
    user's attributes.

    Args:
        model: A `keras.Model`.

    Returns:
        A list: among others `tf.Variable`s and Keras' objects, each once.
    """
    found, waiting = {}, [model]
    while waiting:
        value = waiting.pop()
        if id(value) in found or isinstance(value, _HOLDS_NONE):
            continue
        found[id(value)] = value
        if isinstance(value, tf.Variable):
            continue
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            waiting.extend(value)
        elif isinstance(value, types.MethodType):
            waiting.append(value.__self__)
        else:
            attributes = getattr(value, "__dict__", {})
            waiting.extend(
                part for name, part in attributes.items() if name not in _NOT_ITS_OWN
            )
    return list(found.values())


def written_handles(graph):
    """Returns the handles, outside of all graphs, of what a traced graph writes."""
    captured, level = {}, graph
    while hasattr(level, "captures"):
        captured.update((id(inside), outside) for outside, inside in level.captures)
        level = level.outer_graph
    handles = []
    for operation in graph.get_operations():
        _, writes = auto_control_deps_utils.get_read_write_resource_inputs(operation)
        for handle in writes:
            while id(handle) in captured:
                handle = captured[id(handle)]
            handles.append(handle)
    return handles


# Keras 3.10 has none.
_SEVERAL: tuple[type, ...] = ()


if hasattr(keras.optimizers, "MultiOptimizer"):
    _SEVERAL = (keras.optimizers.MultiOptimizer,)


def optimizers_of(objects):
    """Returns the optimizers among objects; not those that only wrap another one."""
    wrappers = (keras.optimizers.LossScaleOptimizer, *_SEVERAL)
    return [
        value
        for value in objects
        if isinstance(value, keras.optimizers.Optimizer)
        and not isinstance(value, wrappers)
    ]


def learning_rate(optimizer):
    """Returns the rate of an optimizer's next step, the mean of those of several."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(optimizer, _SEVERAL):
        rates = [learning_rate(part) for part in optimizer.optimizers]
        return tf.add_n(rates) / len(rates)
    return tf.cast(optimizer.learning_rate, tf.float64)


def means(model):
    """Returns the `keras.metrics.Mean`s of a compiled model, Keras' loss tracker first.

    Keras' own tracker is in `model.metrics` only as long as the model has no `metrics`
    of its own, and a metric that `train_step` alone knows is only among what the layer
    tracks.
    """
    found = {}
    for metric in (model._loss_tracker, *model.metrics, *model._metrics):
        if isinstance(metric, keras.metrics.Mean):
            found.setdefault(id(metric), metric)
    return list(found.values())


@contextlib.contextmanager
def noted_results(metrics):
    """Yields a dict from the number of a metric to the results that it gives.

    By these alone can it be told from which metric a `train_step` has a number. Several
    replicas may be in their steps at the same time, each in a thread of its own.
    """
    given = {number: [] for number in range(len(metrics))}
    token = _given.set({id(metric): given[i] for i, metric in enumerate(metrics)})
    for metric in metrics:
        if id(metric) not in _noting:
            # Past Keras, which tracks what a metric is given.
            result = functools.partial(_note_result, id(metric), metric.result)
            object.__setattr__(metric, "result", result)
        _noting[id(metric)] += 1
    try:
        yield given
    finally:
        _given.reset(token)
        for metric in metrics:
            _noting[id(metric)] -= 1
            if not _noting[id(metric)]:
                del _noting[id(metric)]
                object.__delattr__(metric, "result")


def _note_result(key, result):
    value = result()
    if (given := _given.get()) and key in given:
        given[key].append(value)
    return value


# How many replicas note the results of a metric, and lists of what this one has noted.
_noting: collections.Counter[int] = collections.Counter()
_given: contextvars.ContextVar[dict[int, list] | None] = contextvars.ContextVar(
    "given", default=None
)


def moving_averages(optimizer):
    """Returns pairs of a weight and the moving average that an optimizer has of it."""
    averages = getattr(optimizer, "_model_variables_moving_average", ())
    return [
        (weight, average)
        for weight, average in zip(optimizer._trainable_variables, averages)
        if average is not None
    ]
