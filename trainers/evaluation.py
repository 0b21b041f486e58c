"""The loss and accuracy of each particle of a swarm, and of its agreed model."""

import math
from typing import NamedTuple

import keras
import tensorflow as tf


class Score(NamedTuple):
    """How well one set of weights does on a data set.

    Attributes:
        loss: Mean cross-entropy of an example, or of a byte of text, in nats.
        accuracy: Share of them that are told right, 0 to 1.
    """

    loss: float
    accuracy: float

    @property
    def bits(self):
        """Returns the loss in bits."""
        return self.loss / math.log(2)


def evaluate_swarm(model, dataset):
    """Evaluates the model as it stands on this worker's first replica.

    Args:
        model: A `keras.Model` that gives logits.
        dataset: A `tf.data.Dataset` as `datasets.test_dataset` makes it.

    Returns:
        A `Score`; after training it is the same on every worker.
    """
    totals = _totals(dataset, lambda inputs, labels: _count(model, inputs, labels))
    return _score(totals.numpy())


def evaluate_particles(model, dataset):
    """Evaluates every particle with its own weights, each on all the data.

    All workers must call it together.

    Args:
        model: A `keras.Model` that gives logits, made under a `SwarmStrategy`.
        dataset: A `tf.data.Dataset` as `datasets.test_dataset` makes it.

    Returns:
        A list of `Score`, one for each particle of all workers.
    """
    return _gathered(model.distribute_strategy, _local_totals(model, dataset))


def _local_totals(model, dataset):
    """Returns what `_score` needs of each local particle, a tensor."""
    strategy = model.distribute_strategy

    def on_all_replicas(inputs, labels):
        counts = strategy.run(lambda: _count(model, inputs, labels))
        return tf.stack(strategy.experimental_local_results(counts))

    return _totals(dataset, on_all_replicas)


def _gathered(strategy, local):
    """Returns a list of `Score`, of the totals of all workers' particles."""
    num_particles = strategy.num_workers * len(local)

    def place(context):
        replica = context.replica_id_in_sync_group % len(local)
        index = strategy.worker_index * len(local) + replica
        return tf.pad([local[replica]], [[index, num_particles - 1 - index], [0, 0]])

    rows = strategy.experimental_distribute_values_from_function(place)
    table = strategy.reduce("SUM", rows, axis=None).numpy()
    # A worker that is lost counts no example.
    return [_score(row) for row in table if row[-1]]


class ParticleEvaluation(keras.callbacks.Callback):
    """Evaluates every particle after the last step, before the swarm agrees.

    It must stand before `PSOSync` in the list of callbacks, which may synchronise after
    that step.

    Args:
        dataset: A `tf.data.Dataset` as `datasets.test_dataset` makes it.

    Attributes:
        scores: A list of `Score`, one for each particle.
    """

    def __init__(self, dataset):
        super().__init__()
        self._dataset = dataset
        self._is_last_epoch = False
        self._local = None
        self.scores = []

    def on_train_begin(self, logs=None):
        self._local = None

    def on_epoch_begin(self, epoch, logs=None):
        self._is_last_epoch = epoch + 1 == self.params["epochs"]

    def on_train_batch_end(self, batch, logs=None):
        if self._is_last_epoch and batch + 1 == self.params["steps"]:
            self._local = _local_totals(self.model, self._dataset)

    def on_train_end(self, logs=None):
        if self._local is None:  # Training was stopped earlier.
            self._local = _local_totals(self.model, self._dataset)
        # Gathered only here, where a worker is also that joined after the last step.
        self.scores = _gathered(self.model.distribute_strategy, self._local)


def _totals(dataset, count):
    """Returns the sum of `count(inputs, labels)` over the batches of a data set."""
    count = tf.function(count, reduce_retracing=True, autograph=False)
    return tf.add_n([count(inputs, labels) for inputs, labels in dataset])


def _count(model, inputs, labels):
    """Returns [sum of losses, right answers, examples] of one batch."""
    logits = tf.cast(model(inputs, training=False), tf.float32)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    right = tf.equal(tf.argmax(logits, axis=-1, output_type=labels.dtype), labels)
    return tf.stack(
        [
            tf.reduce_sum(losses),
            tf.reduce_sum(tf.cast(right, tf.float32)),
            tf.cast(tf.size(labels), tf.float32),
        ]
    )


def _score(totals):
    loss, right, examples = totals.tolist()
    return Score(loss / examples, right / examples)
