"""Data sets: what may hand out the user's memory, and what waits in vain when it ends.

`Dataset._functions` and `Dataset._inputs` alone tell which data sets run Python code.
`multi_device_iterator_ops._create_device_dataset` makes the data sets that hand batches
to several local GPUs.
"""

import functools
import itertools

import tensorflow as tf
from tensorflow.python.data.ops import multi_device_iterator_ops

from tf_psops.batches import local_batches


def _without_tuning(create_dataset):
    """Spares the end of each epoch a wait of up to a minute.

    tf.data's tuning thread is told of the end of an iterator before it can see that
    it has ended, and may sleep on for its whole period, which grows to 60 seconds.
    In these data sets there is nothing to tune: one fixed prefetch for each device.
    """

    @functools.wraps(create_dataset)
    def create(*args):
        options = tf.data.Options()
        options.autotune.enabled = False
        return create_dataset(*args).with_options(options)

    return create


multi_device_iterator_ops._create_device_dataset = _without_tuning(
    multi_device_iterator_ops._create_device_dataset
)


def _may_alias_arrays(dataset):
    """Returns whether a data set may hand out the memory of the user's arrays.

    What Python code returns becomes a tensor without a copy where NumPy's memory is
    aligned. TensorFlow keeps such a tensor as it is, but writes into parts of it.
    """
    for function in dataset._functions():
        graph = function.function.graph.as_graph_def()
        nodes = itertools.chain(
            graph.node, *(f.node_def for f in graph.library.function)
        )
        if any("PyFunc" in node.op for node in nodes):
            return True
    return any(map(_may_alias_arrays, dataset._inputs()))


def copied(dataset):
    """Makes a data set hand out memory of its own where it may be the user's."""
    if not _may_alias_arrays(dataset):
        return dataset
    return local_batches.map_values(
        lambda value: tf.nest.map_structure(
            lambda tensor: tf.raw_ops.DeepCopy(x=tensor), value, expand_composites=True
        ),
        dataset,
    )
