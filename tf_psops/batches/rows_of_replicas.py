"""How many rows of a batch each replica has.

The gradients of replicas that train as one particle are averaged. What one has of a
mean counts by its rows, so that a batch that does not go up trains as in one piece, and
a replica without rows has no say. Nor has a particle of one replica without rows.

In an evaluation all replicas of the swarm have equal weights, and a mean is that of all
their rows. Workers may have more batches than others: those who have no more take part
in what the others ask, without rows, until nobody asks.
"""

import contextlib
import contextvars

import tensorflow as tf

_current: contextvars.ContextVar["RowsOfReplicas | None"] = contextvars.ContextVar(
    "current", default=None
)
# Whether all replicas of the swarm evaluate one batch.
_evaluates = contextvars.ContextVar("evaluates", default=False)


def current():
    """Returns the `RowsOfReplicas` of the replica that asks, or `None`."""
    replica = tf.distribute.get_replica_context()
    rows = _current.get()
    return rows if rows and replica and replica.strategy is rows.strategy else None


@contextlib.contextmanager
def evaluating():
    """Lets all replicas of a swarm evaluate each batch as one, in a `with` block."""
    token = _evaluates.set(True)
    try:
        yield
    finally:
        _evaluates.reset(token)


def end_evaluation(strategy):
    """Takes part in what others ask in an evaluation, who have more batches."""
    if strategy.peers is not None:
        with strategy.barrier("the end of an evaluation"):
            while sum_over_workers(strategy, 0.0, goes_on=False)[1] > 0:
                pass


def sum_over_workers(strategy, value, goes_on=True):
    """Returns the sum of a scalar over the workers, and how many of them evaluate."""
    mine = tf.stack([[value, float(goes_on)]])
    told = strategy.collectives.concat(mine, axis=0)
    return tf.unstack(tf.reduce_sum(tf.ensure_shape(told, [None, 2]), axis=0))


def knowing_rows(strategy, function, arguments, report, losses_of):
    """Lets a function that a replica runs know of the rows of its batch.

    Args:
        strategy: A `SwarmStrategy`.
        function: The function that `strategy.run` is to run on every replica.
        arguments: A nest of its arguments, the first tensor of which is a batch.
        report: A function of what it returns and the `RowsOfReplicas`.
        losses_of: A function of a function without graph, its arguments and the
            `RowsOfReplicas` that returns the `losses` of that.

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
    # One that is not split, as in `train_on_batch`, is each replica's.
    times = len(extended.worker_devices) // len(copies)
    local = times * tf.add_n([_count(copy) for copy in copies])
    may_lack = strategy.num_replicas_in_sync > 1 and any(
        not copy.shape[0] for copy in copies
    )
    replicas, evaluates = extended.replicas_per_particle, _evaluates.get()
    particles = strategy.num_replicas_in_sync // replicas if evaluates else 1
    if replicas == particles == 1 and not may_lack:
        return function, local

    def known(*args, **kwargs):
        own = first_batch((args, kwargs))
        rows = RowsOfReplicas(
            strategy, own, local, times, replicas * particles, particles, evaluates
        )
        if tf.executing_eagerly() and rows.replicas > 1:
            rows.losses = losses_of(function, (args, kwargs), rows)
        with rows.known():
            return report(function(*args, **kwargs), rows)

    return known, local


def first_batch(arguments):
    """Returns the first tensor with rows of a nest."""
    return next(filter(_has_rows, tf.nest.flatten(arguments)))


class RowsOfReplicas:
    """What a replica knows of the rows of its particle, or of an evaluation.

    Attributes:
        strategy: The `SwarmStrategy`.
        replicas: How many replicas, of all workers, take the batch together: those of a
            particle; of the swarm in an evaluation.
        shares: Into how many shares the batch is split for them.
        evaluates: Whether this is an evaluation.
        num_rows: Rows of this replica, an int where the graph knows them, or `None`.
        has_keras_loss: Whether the step has come to a loss of Keras.
        has_own_loss: Whether a layer has added a loss of the user's own, or a compiled
            one was a scalar.
        losses: What knows the losses of a step that runs eagerly, or learns them.
        is_trial: Whether the step makes a graph that is only looked at.
    """

    def __init__(self, strategy, batch, local, times, replicas, particles, evaluates):
        self.strategy = strategy
        self._times = min(times, replicas)  # As a replica of its own has all anyway.
        self.replicas, self.shares = replicas, replicas // self._times
        self.evaluates = evaluates
        self.num_rows = batch.shape[0]
        self.has_keras_loss = self.has_own_loss = False
        self.losses = None
        self.is_trial = False
        self._own = _count(batch)
        self._local = local
        self._particles = particles
        self._graph = None if tf.executing_eagerly() else self._own.graph
        self._total = self._own if self.replicas == 1 else None
        if 1 < self.replicas <= len(strategy.extended.worker_devices):
            self._total = local / self._times

    @contextlib.contextmanager
    def known(self):
        """Lets this be `current` in a `with` block."""
        token = _current.set(self)
        try:
            yield
        finally:
            _current.reset(token)

    def trial(self, batch, losses):
        """Returns one for a graph that is only looked at: nobody is asked there."""
        own = _count(batch)
        trial = RowsOfReplicas(
            self.strategy, batch, own, 1, self.replicas, 1, self.evaluates
        )
        trial._total, trial.sum, trial.losses = own, tf.identity, losses
        trial.is_trial = True
        return trial

    def total(self):
        """Returns the rows of all replicas of the particle; all of them must ask."""
        if self._total is None:
            # Where all that follows in this step can reach it. Not where replicas wait
            # for each other in Python, as in training: TensorFlow has to see that one
            # is inside of a function, whose lock another one would wait for.
            devices = len(self.strategy.extended.worker_devices)
            inside = self._graph and (self.evaluates or devices == 1)
            with self._graph.as_default() if inside else contextlib.nullcontext():
                self._total = self.sum(self._own)
        return self._total

    def sum(self, value):
        """Returns the sum of a scalar over the shares; all replicas must ask."""
        value = tf.cast(value, "float32") / self._times
        if not self.evaluates:
            replica = tf.distribute.get_replica_context()
            return replica.all_reduce(tf.distribute.ReduceOp.SUM, value)
        return self.strategy.extended.sum_over_replicas(
            value, lambda local: sum_over_workers(self.strategy, local)[0]
        )

    def weight(self):
        """Returns what a mean over this replica's rows counts, 1 on average."""
        return tf.math.divide_no_nan(self._own * self.shares, self.total())

    def weight_of_metric(self):
        """Returns `weight`, or whether there are rows where nobody has asked for it."""
        if self._total is None and not self.evaluates:
            return tf.cast(self._own > 0, "float32")
        return self.weight()

    def has_any(self):
        """Tells whether this replica has rows."""
        return self._own > 0

    def weight_of_report(self):
        """Returns what a mean counts among this worker's replicas, 1 on average."""
        devices = len(self.strategy.extended.worker_devices)
        return tf.math.divide_no_nan(self._own * devices, self._local)

    def times_own(self):
        """Returns how many times the rows of this replica those of all replicas are."""
        return tf.math.divide_no_nan(self.total(), self._own)

    def weight_of_sum(self):
        """Returns what a sum over this replica's rows is to be multiplied by.

        In an evaluation, too, the sum of a particle is that of its rows.
        """
        return self.times_own() / self._particles

    def runs_eagerly(self):
        """Tells whether the step of this replica runs eagerly."""
        return self._graph is None

    def may_ask(self):
        """Tells whether `total` asks no other worker, or all of them ask."""
        return self._total is not None or self.evaluates


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
