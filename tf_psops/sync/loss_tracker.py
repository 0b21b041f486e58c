"""What every particle notes of its own training, without a word to the others."""

import tensorflow as tf


class LossTracker:
    """Counts each particle's steps and adds up its training loss and learning rate.

    Keras' own loss tracker starts anew at every epoch and evaluation, and its value
    outside the replicas is that of the whole swarm; this one is each particle's own
    and starts anew at each synchronisation.

    Args:
        strategy: A `SwarmStrategy`.
        model: The compiled `keras.Model` that was made in its scope.
        num_examples: How many examples of each replica's latest batch to keep as
            well. A model whose inputs have a batch size of their own needs all.

    Attributes:
        variables: A nest of all `tf.Variable`s that `close` changes.
    """

    def __init__(self, strategy, model, num_examples):
        self._strategy = strategy
        self._batches = {} if num_examples else None
        inputs = tf.nest.flatten(getattr(model, "inputs", None) or [])
        fixed = any(value.shape[:1] != (None,) for value in inputs)
        self._kept = slice(None if fixed else num_examples)
        self._tracker = model.metrics[0]
        self._optimizer = model.optimizer
        with strategy.scope():
            # Steps, and since `close` steps, learning rates, loss and weight. One
            # variable: each costs time at every step.
            self._sums = tf.Variable(tf.zeros([5], tf.float64), trainable=False)
        self._local = strategy.experimental_local_results(self._sums)
        self._keras_sums = [
            strategy.experimental_local_results(variable.value)
            for variable in (self._tracker.total, self._tracker.count)
        ]
        self.variables = self._local, self._keras_sums
        strategy.observe(model, self._observer)

    def _observer(self, train_step):
        def noted(data):
            loss = tf.identity(self._tracker.total.value)
            weight = tf.identity(self._tracker.count.value)
            # That of this step, which moves a schedule on.
            rate = tf.cast(self._optimizer.learning_rate, tf.float64)
            if self._batches is not None:
                self._keep(data)
            result = train_step(data)
            loss = self._tracker.total.value - loss
            weight = self._tracker.count.value - weight
            row = [tf.cast(value, tf.float64) for value in (1, 1, rate, loss, weight)]
            self._sums.assign_add(tf.stack(row))
            return result

        return noted

    def _keep(self, data):
        replica = self._strategy.local_replica()
        if replica not in self._batches:
            with tf.init_scope(), tf.device(self._local[replica].device):
                self._batches[replica] = tf.nest.map_structure(_variable_like, data)
        tf.nest.map_structure(
            lambda variable, value: (
                variable if value is None else variable.assign(value[self._kept])
            ),
            self._batches[replica],
            data,
        )

    def batch(self, replica):
        """Returns what is kept of a local replica's latest batch."""
        return tf.nest.map_structure(
            lambda variable: None if variable is None else variable.read_value(),
            self._batches[replica],
        )

    def begin(self, replica):
        """Begins a local replica's count and its first mean."""
        self._local[replica].assign(tf.zeros([5], tf.float64))
        self.close(replica)

    def sums(self, replica):
        """Returns the variable that a local replica's count and mean are in."""
        return self._local[replica]

    def steps(self, replica):
        """Returns the local steps of a local replica since `begin`, float64."""
        return self._local[replica][0]

    def num_steps(self, replica):
        """Returns `steps` as an int, outside of a `tf.function`."""
        return int(self._local[replica].numpy()[0])

    def mean_loss(self, replica):
        """Returns a local replica's mean loss since `close`; NaN without a step."""
        return self._local[replica][3] / self._local[replica][4]

    def learning_rate(self, replica):
        """Returns a local replica's mean rate since `close`; 0 without a step."""
        return tf.math.divide_no_nan(self._local[replica][2], self._local[replica][1])

    def close(self, replica):
        """Begins a local replica's next mean."""
        self._local[replica][1:].assign(tf.zeros([4], tf.float64))
        # A NaN would stay in Keras' own sum, and so in all that is told from it, to
        # the end of the epoch, though the particle may be in good health from here.
        total, count = (variables[replica] for variables in self._keras_sums)
        sound = tf.math.is_finite(total)
        count.assign(tf.where(sound, count, 0))
        total.assign(tf.where(sound, total, 0))


def _variable_like(value):
    """Returns a variable for tensors like `value`, of any number of rows."""
    if value is None:
        return None
    if not isinstance(value, tf.Tensor):
        raise ValueError(
            "A rule with trial positions scores them on the latest batch, which must "
            f"be of dense tensors. Received: {type(value).__name__}. Use dense inputs, "
            "or another rule, such as tf_psops.ParameterAverage()."
        )
    shape = tf.TensorShape([None]).concatenate(value.shape[1:])
    return tf.Variable(
        tf.zeros([0 if size is None else size for size in shape], value.dtype),
        shape=shape,
        trainable=False,
    )
