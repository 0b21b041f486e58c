"""The stream of batches that each particle trains on."""

import numpy as np
import tensorflow as tf

from trainers.datasets import partitions
from trainers.datasets.images import ImageData
from trainers.datasets.python_source import TextData


def train_dataset(
    data: ImageData | TextData,
    *,
    num_particles: int,
    batch_size: int,
    epochs: int,
    seed: int,
    partition: str = "full",
    shards_per_worker: int = 2,
    input_context: tf.distribute.InputContext | None = None,
) -> tf.data.Dataset:
    """Builds the training batches of all particles for all epochs.

    The epochs follow one another in one data set, because a different permutation
    per epoch must not depend on how often Keras restarts the iterator. Give `fit`
    both `epochs` and `steps_per_epoch`, and a `steps_per_execution` that divides
    the latter; to resume at an epoch, `skip` its `steps_per_epoch` predecessors.

    Elements are global batches, particle 0's rows first. A `SwarmStrategy` splits them
    so that replica `i` gets particle `i`'s rows. So does `tf.distribute` if there is
    one worker, or one replica per worker; else pass the `input_context` of
    `Strategy.distribute_datasets_from_function`.

    Args:
        data: The data set.
        num_particles: Number of particles, `strategy.num_replicas_in_sync`.
        batch_size: Examples per particle and step.
        epochs: Number of epochs.
        seed: Non-negative integer from which the order of the data follows.
        partition: Which data each particle sees, see `epoch_indices`. Defaults to
            "full".
        shards_per_worker: See `epoch_indices`. Defaults to 2.
        input_context: If given, elements are the batches of one particle each, in
            turns of the particles of this input pipeline. Defaults to `None`.

    Returns:
        A `tf.data.Dataset` of `epochs * steps_per_epoch` elements. Of images they are
        `(images, labels)`: float32 [num_particles * batch_size, height, width,
        channels] in [0, 1] and int32 [num_particles * batch_size]. Of text they are
        `(bytes, next bytes)`, both int32 [num_particles * batch_size, context].

    Raises:
        ValueError: If `partition` is unknown, a size does not fit the data or
            `input_context` has another number of replicas.

    Example:

    ```python
    data = load("digits")
    swarm = dict(num_particles=strategy.num_replicas_in_sync, batch_size=32)
    model.fit(
        train_dataset(data, epochs=5, seed=0, **swarm),
        epochs=5,
        steps_per_epoch=steps_per_epoch(len(data.train_labels), **swarm),
        shuffle=False,
    )
    ```
    """
    if epochs < 1:
        raise ValueError(f"`epochs` must be at least 1. Received: {epochs}.")
    indices = np.concatenate(
        [
            partitions.epoch_indices(
                data.train_labels,
                num_particles=num_particles,
                batch_size=batch_size,
                epoch=epoch,
                seed=seed,
                partition=partition,
                shards_per_worker=shards_per_worker,
            )
            for epoch in range(epochs)
        ]
    )
    if input_context is None:
        indices = indices.reshape(len(indices), -1)
    elif input_context.num_replicas_in_sync == num_particles:
        local = np.split(indices, input_context.num_input_pipelines, axis=1)
        indices = local[input_context.input_pipeline_id].reshape(-1, batch_size)
    else:
        raise ValueError(
            f"`num_particles` must be {input_context.num_replicas_in_sync}, the "
            f"number of replicas of `input_context`. Received: {num_particles}."
        )
    arrays = [tf.constant(array) for array in data.train]

    def look_up(rows):
        return data.prepare(*(tf.gather(array, rows) for array in arrays))

    batches = tf.data.Dataset.from_tensor_slices(indices).map(look_up)
    return _prefetched(batches)


def test_dataset(data: ImageData | TextData, batch_size: int) -> tf.data.Dataset:
    """Builds one pass over the test set, in order.

    Args:
        data: The data set.
        batch_size: Examples per batch, over all replicas. The last batch may be
            smaller.

    Returns:
        A `tf.data.Dataset` of batches as `train_dataset` makes them.

    Example:

    ```python
    model.evaluate(test_dataset(load("digits"), batch_size=360))
    ```
    """
    batches = tf.data.Dataset.from_tensor_slices(data.test).batch(batch_size)
    return _prefetched(batches.map(data.prepare))


def _prefetched(batches):
    # Nothing here is tuned, and tf.data may wait up to a minute for its tuning thread
    # when an iterator ends (seen with TensorFlow 2.21).
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.prefetch(2).with_options(options)
