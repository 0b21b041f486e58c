"""How many rows of a batch each replica has.

The gradients of replicas that train as one particle are averaged. What one has of a
mean counts by its rows, so that a batch that does not go up trains as in one piece, and
a replica without rows has no say. Nor has a particle of one replica without rows.
"""

import contextlib
import contextvars

import tensorflow as tf

_current: contextvars.ContextVar["RowsOfReplicas | None"] = contextvars.ContextVar(
    "current", default=None
)


def current():
    """Returns the `RowsOfReplicas` of the replica that asks, or `None`."""
    replica = tf.distribute.get_replica_context()
    rows = _current.get()
    return rows if rows and replica and replica.strategy is rows.strategy else None


def knowing_rows(strategy, function, arguments, report):
    """Lets a function that a replica runs know of the rows of its batch.

    Args:
        strategy: A `SwarmStrategy`.
        function: The function that `strategy.run` is to run on every replica.
        arguments: A nest of its arguments, the first tensor of which is a batch.
        report: A function of what it returns and the `RowsOfReplicas`.

    Returns:
        A function that runs with `current` set, where that matters, and the rows of all
        local replicas, `None` if there is no batch.
    """
    extended = strategy.extended
    for value in tf.nest.flatten(arguments):
        copies = strategy.experimental_local_results(value)
        if all(map(_has_rows, copies)):
            break
    else:
        return function, None
    # One that is not split is each replica's.
    times = 1 if len(copies) > 1 else len(extended.worker_devices)
    local = times * tf.add_n([_count(copy) for copy in copies])
    may_lack = strategy.num_replicas_in_sync > 1 and any(
        not copy.shape[0] for copy in copies
    )
    if extended.replicas_per_particle == 1 and not may_lack:
        return function, local

    def known(*args, **kwargs):
        own = next(filter(_has_rows, tf.nest.flatten((args, kwargs))))
        rows = RowsOfReplicas(strategy, own, local)
        token = _current.set(rows)
        try:
            return report(function(*args, **kwargs), rows)
        finally:
            _current.reset(token)

    return known, local


class RowsOfReplicas:
    """What a replica knows of the rows of its particle.

    Attributes:
        strategy: The `SwarmStrategy`.
        replicas: How many replicas the particle has, of all workers.
        num_rows: Rows of this replica, an int where the graph knows them, or `None`.
        has_keras_loss: Whether the step has come to a loss of Keras.
        adds_loss: Whether a layer has added a loss of the user's own.
    """

    def __init__(self, strategy, batch, local):
        self.strategy = strategy
        self.replicas = strategy.extended.replicas_per_particle
        self.num_rows = batch.shape[0]
        self.has_keras_loss = self.adds_loss = False
        self._own = _count(batch)
        self._local = local
        self._graph = None if tf.executing_eagerly() else self._own.graph
        self._total = self._own if self.replicas == 1 else None
        if 1 < self.replicas <= len(strategy.extended.worker_devices):
            self._total = local

    def total(self):
        """Returns the rows of all replicas of the particle; all of them must ask."""
        if self._total is None:
            # Where all that follows in this step can reach it. Not where replicas wait
            # for each other in Python: TensorFlow has to see that one is inside of a
            # function, whose lock another one would wait for.
            waits = len(self.strategy.extended.worker_devices) > 1
            inside = self._graph and not waits
            with self._graph.as_default() if inside else contextlib.nullcontext():
                self._total = self.sum(self._own)
        return self._total

    def sum(self, value):
        """Returns the sum of a scalar over the replicas; all of them must ask."""
        replica = tf.distribute.get_replica_context()
        return replica.all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(value, "float32"))

    def weight(self):
        """Returns what a mean over this replica's rows counts, 1 on average."""
        return tf.math.divide_no_nan(self._own * self.replicas, self.total())

    def weight_of_metric(self):
        """Returns `weight`, or whether there are rows where nobody has asked for it."""
        if self._total is None:
            return tf.cast(self._own > 0, "float32")
        return self.weight()

    def weight_of_report(self):
        """Returns what a mean counts among this worker's replicas, 1 on average."""
        devices = len(self.strategy.extended.worker_devices)
        return tf.math.divide_no_nan(self._own * devices, self._local)

    def weight_of_sum(self):
        """Returns what a sum over this replica's rows is to be multiplied by."""
        return tf.math.divide_no_nan(self.total(), self._own)

    def knows_total(self):
        """Tells whether `total` asks no other worker."""
        return self._total is not None


def _has_rows(value):
    if isinstance(value, (tf.SparseTensor, tf.RaggedTensor)):
        return True
    return isinstance(value, tf.Tensor) and bool(value.shape.rank)


def _count(value):
    if isinstance(value, tf.SparseTensor):
        rows = value.dense_shape[0]
    else:
        ragged = isinstance(value, tf.RaggedTensor)
        rows = value.nrows() if ragged else tf.shape(value)[0]
    return tf.cast(rows, tf.float32)
