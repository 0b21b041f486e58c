"""What every particle notes of its own training, without a word to the others."""

import tensorflow as tf


class Ledger:
    """Counts each particle's steps and adds up its training loss.

    Keras' own loss tracker starts anew at every epoch and evaluation, and its value
    outside the replicas is that of the whole swarm; this one is each particle's own
    and starts anew at each synchronisation.

    Args:
        strategy: A `SwarmStrategy`.
        model: The compiled `keras.Model` that was made in its scope.
    """

    def __init__(self, strategy, model):
        self._tracker = model.metrics[0]
        with strategy.scope():
            self._steps = tf.Variable(0, dtype=tf.int64, trainable=False)
            self._loss = tf.Variable(0.0, trainable=False)
            self._weight = tf.Variable(0.0, trainable=False)
        self._local = [
            strategy.experimental_local_results(variable)
            for variable in (self._steps, self._loss, self._weight)
        ]
        strategy.observe(model, self._observer)

    def _observer(self, train_step):
        def noted(data):
            loss = tf.identity(self._tracker.total.value)
            weight = tf.identity(self._tracker.count.value)
            result = train_step(data)
            self._steps.assign_add(1)
            self._loss.assign_add(self._tracker.total.value - loss)
            self._weight.assign_add(self._tracker.count.value - weight)
            return result

        return noted

    def begin(self, replica):
        """Begins a local replica's count and its first mean."""
        self._local[0][replica].assign(0)
        self.close(replica)

    def steps(self, replica):
        """Returns the local steps of a local replica since `begin`, int64."""
        return self._local[0][replica]

    def mean_loss(self, replica):
        """Returns a local replica's mean loss since `close`; NaN without a step."""
        return self._local[1][replica] / self._local[2][replica]

    def close(self, replica):
        """Begins a local replica's next mean."""
        self._local[1][replica].assign(0.0)
        self._local[2][replica].assign(0.0)
