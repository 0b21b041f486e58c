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

    Attributes:
        variables: A nest of all `tf.Variable`s that `close` changes.
    """

    def __init__(self, strategy, model):
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
            result = train_step(data)
            loss = self._tracker.total.value - loss
            weight = self._tracker.count.value - weight
            row = [tf.cast(value, tf.float64) for value in (1, 1, rate, loss, weight)]
            self._sums.assign_add(tf.stack(row))
            return result

        return noted

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
