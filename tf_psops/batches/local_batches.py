"""How one stream of batches feeds all devices of a worker.

TensorFlow's iterator for several devices copies to each of them in a thread of its own.
CPU devices share their memory and have no use for that.
"""

import itertools

import tensorflow as tf


def check(dataset, num_parts):
    """Raises a `ValueError` unless the elements of a data set have rows to split."""
    for spec in tf.nest.flatten(dataset.element_spec):
        if isinstance(spec, tf.TensorSpec) and spec.shape.rank == 0:
            raise ValueError(
                f"A batch is split over {num_parts} devices by its rows. Expected a "
                f"data set of batches. Received elements of {dataset.element_spec}, "
                "in which a scalar has no rows. Call `batch` on the data set."
            )


def map_values(function, dataset):
    """Maps each value of each batch, and leaves what stands for `None` in Keras."""

    def map_value(value):
        missing = value is None or isinstance(value, tf.experimental.Optional)
        return value if missing else function(value)

    @tf.autograph.experimental.do_not_convert
    def map_batch(*batch):
        return tf.nest.map_structure(map_value, _element(dataset, batch))

    return dataset.map(map_batch)


def split(dataset, full_size, num_parts, join):
    """Splits each batch of a data set into one part for each local device.

    Rows stay in order, the first device's first. Full batches are split evenly; a
    smaller one fills one device after the other, and leaves the last without rows.

    Args:
        dataset: A `tf.data.Dataset` of batches.
        full_size: Rows of a full batch, -1 if that is not known: then every batch
            counts as a full one, which the last device may get less of.
        num_parts: How many devices.
        join: A function that makes one value of a list of a value for each device.

    Returns:
        A `tf.data.Dataset` of nests of joined values.
    """

    return map_values(lambda value: join(parts(value, full_size, num_parts)), dataset)


def parts(value, full_size, num_parts):
    """Returns the rows of each part of a value, of which `full_size` make a batch."""
    if full_size >= 0:
        size, more = divmod(full_size, num_parts)
        ends = [(i + 1) * size + min(i + 1, more) for i in range(num_parts)]
    else:
        size = -(-_num_rows(value) // num_parts)
        ends = [(i + 1) * size for i in range(num_parts)]
    bounds = [0, *ends[:-1], _num_rows(value)]
    return [_rows(value, *ends) for ends in itertools.pairwise(bounds)]


def take_turns(dataset, num_parts, join):
    """Hands the batches of a data set to the local devices in turns.

    Args:
        dataset: A `tf.data.Dataset` of batches, each for one device.
        num_parts: How many devices.
        join: A function that makes one value of a list of a value for each device.

    Returns:
        A `tf.data.Dataset` of nests of joined values. In the last one, devices may be
        left without rows.
    """
    empty = tf.nest.map_structure(_without_rows, dataset.element_spec)

    @tf.autograph.experimental.do_not_convert
    def gather(*windows):
        turn = tf.data.Dataset.zip(_element(dataset, windows))
        turn = turn.concatenate(tf.data.Dataset.from_tensors(empty).repeat())
        batches = [turn.skip(i).take(1).get_single_element() for i in range(num_parts)]
        return tf.nest.map_structure(lambda *values: join(values), *batches)

    return dataset.window(num_parts).map(gather)


def _element(dataset, arguments):
    """Returns the element of which `Dataset.map` makes a function's arguments."""
    return arguments if isinstance(dataset.element_spec, tuple) else arguments[0]


def _num_rows(value):
    if isinstance(value, tf.SparseTensor):
        return value.dense_shape[0]
    return value.nrows() if isinstance(value, tf.RaggedTensor) else tf.shape(value)[0]


def _rows(value, start, end):
    if isinstance(value, tf.SparseTensor):
        shape = tf.cast(value.dense_shape, tf.int64)
        begin = tf.concat([[tf.cast(start, tf.int64)], tf.zeros_like(shape[1:])], 0)
        size = tf.concat([[tf.cast(end - start, tf.int64)], shape[1:]], 0)
        rows = tf.sparse.slice(value, begin, size)
        rows.set_shape([None, *value.shape[1:]])
        return rows
    return value[start:end]


def _without_rows(spec):
    shape = [0, *(size or 0 for size in spec.shape[1:])]
    return tf.zeros(shape, spec.dtype)
