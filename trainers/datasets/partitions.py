"""Which examples each particle sees, and in what order."""

import numpy as np

PARTITIONS = ("full", "iid", "label")


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


def duration(
    num_examples: int,
    *,
    epochs: int,
    steps: int | None,
    num_particles: int,
    batch_size: int,
) -> tuple[int, int, int]:
    """Returns how long a training lasts.

    Args:
        num_examples: See `steps_per_epoch`.
        epochs: Passes of the whole swarm over the training data.
        steps: If given, the local steps of each particle, in place of `epochs`.
        num_particles: See `steps_per_epoch`.
        batch_size: See `steps_per_epoch`.

    Returns:
        The epochs and the steps of each for `fit`, for which `steps` are one epoch, and
        how many times `train_dataset` has to go over the data.

    Raises:
        ValueError: If a size is not positive or the data do not fill one step.
    """
    once = steps_per_epoch(
        num_examples, num_particles=num_particles, batch_size=batch_size
    )
    if steps is None:
        return epochs, once, epochs
    if steps < 1:
        raise ValueError(f"`steps` must be at least 1. Received: {steps}.")
    return 1, steps, -(-steps // once)


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
    *   "label": a fixed share of few classes (of text: of packages of its own),
        reshuffled every epoch. The data, sorted by label, are cut into
        `num_particles * shards_per_worker` shards which are dealt at random (McMahan
        et al. 2017, https://arxiv.org/abs/1602.05629, section 3).

    A share has `len(labels) // num_particles` examples, and an epoch uses as many
    whole batches of it as fit; which examples it leaves out changes with the epoch.

    Args:
        labels: Integer array [N], the class or the package of each example.
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
