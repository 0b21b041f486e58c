"""Image data sets and the stream of batches that each particle trains on.

A particle's batches follow from `(seed, partition, particle, epoch)` alone, so a
swarm sees the same data however its particles are spread over processes.
`epoch_indices` decides who sees what, in NumPy; `train_dataset` looks it up.
"""

import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf

NAMES = ("digits", "mnist", "cifar10")
PARTITIONS = ("full", "iid", "label")


class ImageData(NamedTuple):
    """Labelled images, in memory.

    Pixels stay bytes, a quarter of the size of floats, because every worker process
    holds a copy; `train_dataset` and `test_dataset` scale them to [0, 1].

    Attributes:
        train_images: uint8 array [N, height, width, channels].
        train_labels: int32 array [N], each in [0, num_classes).
        test_images: uint8 array [M, height, width, channels].
        test_labels: int32 array [M].
        num_classes: Number of classes.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int


def load(name: str, data_dir: str | os.PathLike | None = None) -> ImageData:
    """Loads a data set.

    "digits" comes with scikit-learn: 1437 training and 360 test images, 8x8x1, a
    fixed stratified split. "mnist" (28x28x1) and "cifar10" (32x32x3) are read with
    TensorFlow Datasets, which downloads them into its own folder if that lacks them.

    Args:
        name: One of `NAMES`.
        data_dir: Folder of TensorFlow Datasets that holds the data; unused by
            "digits". Defaults to `~/tensorflow_datasets`.

    Returns:
        The whole data set as `ImageData`.

    Raises:
        ValueError: If `name` is unknown.
        OSError: If the data are not in `data_dir`, or cannot be downloaded.

    Example:

    ```python
    data = load("digits")
    data.train_images.shape  # (1437, 8, 8, 1)
    ```
    """
    if name not in NAMES:
        raise ValueError(f"Unknown `name`. Received: {name!r}. Expected: {NAMES}.")
    return _load_digits() if name == "digits" else _load_tfds(name, data_dir)


def _load_digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)  # Pixels are 0, 1, ..., 16.
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images,
        labels.astype(np.int32),
        test_size=360,
        stratify=labels,
        random_state=0,
    )
    return ImageData(train_images, train_labels, test_images, test_labels, 10)


def _load_tfds(name, data_dir):
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    if data_dir and not os.path.exists(builder.data_path):
        raise OSError(
            f"Data set {name!r} is not in {builder.data_path}. Received: data_dir="
            f"{os.fspath(data_dir)!r}. Pass the folder in which TensorFlow Datasets "
            "has prepared it, or leave `data_dir` out to download it."
        )
    try:
        builder.download_and_prepare()  # Returns at once if the data are there.
    except OSError as error:
        raise OSError(
            f"Data set {name!r} is not in {builder.data_path} and could not be "
            "downloaded. Pass a `data_dir` in which TensorFlow Datasets has "
            "prepared it, or connect this machine to the network."
        ) from error
    train, test = tfds.as_numpy(
        builder.as_dataset(split=["train", "test"], batch_size=-1)
    )
    return ImageData(
        train["image"],
        train["label"].astype(np.int32),
        test["image"],
        test["label"].astype(np.int32),
        builder.info.features["label"].num_classes,
    )


def steps_per_epoch(num_examples: int, *, num_particles: int, batch_size: int) -> int:
    """Counts the steps in which a swarm uses up the training data once.

    Args:
        num_examples: Number of training examples.
        num_particles: Number of particles, each of which takes a batch a step.
        batch_size: Examples per particle and step.

    Returns:
        The number of whole steps; the remainder of the data is left out.

    Raises:
        ValueError: If a size is not positive or the data do not fill one step.

    Example:

    ```python
    steps_per_epoch(1437, num_particles=4, batch_size=32)  # 11
    ```
    """
    for name, value in (("num_particles", num_particles), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1. Received: {value}.")
    steps = num_examples // (num_particles * batch_size)
    if not steps:
        raise ValueError(
            f"{num_examples} examples do not fill one step. Received: "
            f"num_particles={num_particles}, batch_size={batch_size}. Expected "
            f"num_particles * batch_size <= {num_examples}: lower one of them."
        )
    return steps


def epoch_indices(
    labels: np.ndarray,
    *,
    num_particles: int,
    batch_size: int,
    epoch: int,
    seed: int,
    partition: str = "full",
    shards_per_worker: int = 2,
) -> np.ndarray:
    """Decides which examples each particle sees in an epoch, and in what order.

    The partition says which data belong to a particle:

    *   "full": all. A fresh permutation of all the data is dealt out every epoch,
        as `tf.distribute` does, and within an epoch no example is seen twice.
    *   "iid": a fixed random share, reshuffled every epoch.
    *   "label": a fixed share of few classes, reshuffled every epoch. The data,
        sorted by label, are cut into `num_particles * shards_per_worker` shards
        which are dealt at random (McMahan et al. 2017,
        https://arxiv.org/abs/1602.05629, section 3).

    A share has `len(labels) // num_particles` examples, and an epoch uses as many
    whole batches of it as fit; which examples it leaves out changes with the epoch.

    Args:
        labels: Integer array [N], the class of each example.
        num_particles: Number of particles.
        batch_size: Examples per particle and step.
        epoch: Epoch, counted from 0.
        seed: Non-negative integer from which all the randomness follows.
        partition: One of `PARTITIONS`. Defaults to "full".
        shards_per_worker: Shards per particle under "label": the fewer, the more
            the particles' data differ. Defaults to 2.

    Returns:
        int32 array [steps, num_particles, batch_size] of positions in `labels`.

    Raises:
        ValueError: If `partition` is unknown or a size does not fit the data.

    Example:

    ```python
    labels = np.arange(12) % 3
    epoch_indices(
        labels, num_particles=2, batch_size=3, epoch=0, seed=1
    ).shape  # (2, 2, 3)
    ```
    """
    steps = steps_per_epoch(
        len(labels), num_particles=num_particles, batch_size=batch_size
    )
    if partition == "full":
        order = _rng(seed, epoch).permutation(len(labels)).astype(np.int32)
        shape = (steps, num_particles, batch_size)
        return order[: steps * num_particles * batch_size].reshape(shape)

    if partition == "iid":
        order = _rng(seed).permutation(len(labels))
    elif partition == "label":
        order = _deal_label_shards(labels, num_particles, shards_per_worker, seed)
    else:
        raise ValueError(
            f"Unknown `partition`. Received: {partition!r}. Expected: {PARTITIONS}."
        )
    share = len(labels) // num_particles
    shares = order[: num_particles * share].reshape(num_particles, share)
    return np.stack(
        [
            _rng(seed, particle, epoch)
            .permutation(own)[: steps * batch_size]
            .reshape(steps, batch_size)
            for particle, own in enumerate(shares)
        ],
        axis=1,
    ).astype(np.int32)


def _deal_label_shards(labels, num_particles, shards_per_worker, seed):
    """Returns the examples sorted by the particle that owns them, share by share."""
    share = len(labels) // num_particles
    if not 1 <= shards_per_worker <= share:
        raise ValueError(
            "`shards_per_worker` must be between 1 and the number of examples per "
            f"particle, {share}. Received: {shards_per_worker}."
        )
    # Shard sizes differ by at most one, and every particle's sum up to its share.
    sizes = np.diff(np.arange(shards_per_worker + 1) * share // shards_per_worker)
    slots = _rng(seed).permutation(num_particles * shards_per_worker)
    particle, shard = np.divmod(slots, shards_per_worker)
    owners = np.repeat(particle, sizes[shard])
    by_label = np.argsort(labels, kind="stable")
    return by_label[np.argsort(owners, kind="stable")]


def _rng(seed, *key):
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def train_dataset(
    data: ImageData,
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

    Elements are global batches, particle 0's rows first. `tf.distribute` splits
    them so that replica `i` gets particle `i`'s rows if there is one worker, or one
    replica per worker. With M > 1 workers of several replicas each, worker `w`
    would get particles w, w + M, ...; for the order of the replicas also there,
    pass the `input_context` of `Strategy.distribute_datasets_from_function`.

    Args:
        data: The images and labels.
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
        A `tf.data.Dataset` of `(images, labels)`: float32
        [num_particles * batch_size, height, width, channels] in [0, 1] and int32
        [num_particles * batch_size], of `epochs * steps_per_epoch` elements.

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
            epoch_indices(
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
    images = tf.constant(data.train_images)
    labels = tf.constant(data.train_labels)

    def look_up(rows):
        return _scale(tf.gather(images, rows)), tf.gather(labels, rows)

    batches = tf.data.Dataset.from_tensor_slices(indices).map(look_up)
    return _prefetched(batches)


def test_dataset(data: ImageData, batch_size: int) -> tf.data.Dataset:
    """Builds one pass over the test images, in order.

    Args:
        data: The images and labels.
        batch_size: Examples per batch, over all replicas. The last batch may be
            smaller.

    Returns:
        A `tf.data.Dataset` of `(images, labels)`: float32
        [batch_size, height, width, channels] in [0, 1] and int32 [batch_size].

    Example:

    ```python
    model.evaluate(test_dataset(load("digits"), batch_size=360))
    ```
    """
    pairs = tf.data.Dataset.from_tensor_slices((data.test_images, data.test_labels))
    batches = pairs.batch(batch_size)
    return _prefetched(batches.map(lambda images, labels: (_scale(images), labels)))


def _prefetched(batches):
    # Nothing here is tuned, and tf.data may wait up to a minute for its tuning thread
    # when an iterator ends (seen with TensorFlow 2.21).
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.prefetch(2).with_options(options)


def _scale(images):
    return tf.cast(images, tf.float32) / 255
