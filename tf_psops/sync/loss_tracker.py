"""What every particle notes of its own training, without a word to the others."""

import tensorflow as tf

from tf_psops import tensorflow_internals


class LossTracker:
    """Counts each particle's steps and adds up its training loss and learning rate.

    Keras' own loss tracker starts anew at every epoch and evaluation, and its value
    outside the replicas is that of the whole swarm; this one is each particle's own
    and starts anew at each synchronisation.

    The loss is what Keras' own tracker adds up, where the model's `train_step` updates
    that; else what a metric of the model's own named "loss" adds up; else what
    `train_step` returns as "loss", a metric's result or the loss of the batch.

    Args:
        strategy: A `SwarmStrategy`.
        model: The compiled `keras.Model` that was made in its scope.

    Attributes:
        variables: A nest of all `tf.Variable`s that a synchronisation changes.
    """

    def __init__(self, strategy, model):
        self._means = tensorflow_internals.means(model)
        self._optimizer = model.optimizer
        with strategy.scope():
            # Steps, and since `close` steps, learning rates, loss and weight. One
            # variable: each costs time at every step.
            self._sums = tf.Variable(tf.zeros([5], tf.float64), trainable=False)
        self._local = strategy.experimental_local_results(self._sums)
        self._keras_sums = [
            [
                strategy.experimental_local_results(variable.value)
                for variable in (mean.total, mean.count)
            ]
            for mean in self._means
        ]
        self.variables = self._local, self._keras_sums
        strategy.observe(model, self._observer)

    def _observer(self, train_step):
        def noted(data):
            before = [_sums(mean) for mean in self._means]
            # That of this step, which moves a schedule on.
            rate = tensorflow_internals.learning_rate(self._optimizer)
            with tensorflow_internals.noted_results(self._means) as results:
                result = train_step(data)
            gains = [_sums(mean) - sums for mean, sums in zip(self._means, before)]
            returned = result.get("loss") if isinstance(result, dict) else None
            loss = self._loss(returned, results, gains, data)
            step = tf.stack([tf.cast(value, tf.float64) for value in (1, 1, rate)])
            self._sums.assign_add(tf.concat([step, loss], axis=0))
            return result

        return noted

    def _loss(self, returned, results, gains, data):
        """Returns the sum and the weight of a step's loss, [2]; 0 where it is unknown.

        Args:
            returned: What the step returned as "loss", or `None`.
            results: A dict from the number of a mean to the results that it gave.
            gains: What each mean has gained in the step, [2].
            data: The batch.
        """
        loss = tf.zeros([2], tf.float64)
        if returned is not None:
            source = [
                number
                for number, given in results.items()
                if any(result is returned for result in given)
            ]
            if source == [0]:
                return gains[0]
            if source:
                loss = gains[source[0]]
            else:
                value = tf.reduce_mean(tf.cast(returned, tf.float64))
                rows = _num_rows(data)
                loss = tf.stack([tf.math.multiply_no_nan(value, rows), rows])
                # A `tf.function` hides whose result it returns.
                for mean, gain in zip(self._means, gains):
                    result = tf.cast(mean.result(), tf.float64)
                    loss = tf.where((gain[1] > 0) & (value == result), gain, loss)
        for mean, gain in reversed(list(zip(self._means, gains))):
            if mean is self._means[0] or mean.name == "loss":
                loss = tf.where(gain[1] > 0, gain, loss)
        return loss

    def begin(self, replica):
        """Begins a local replica's count and its first mean."""
        self._local[replica].assign(tf.zeros([5], tf.float64))
        self.leave_out_nan(replica)

    def sums(self, replica):
        """Returns the variable that a local replica's count and mean are in."""
        return self._local[replica]

    def num_steps(self, replica):
        """Returns the local steps of a local replica since `begin`, an int."""
        return int(self._local[replica].numpy()[0])

    @staticmethod
    def loss(sums):
        """Returns the mean loss since `close` of `sums`, and whether there was any.

        It is NaN where there was none.
        """
        *_, loss, weight = tf.unstack(sums)
        return loss / weight, weight != 0

    def steps_and_rate(self, replica):
        """Returns a local replica's steps since `begin`, and mean rate since `close`.

        The rate is 0 without a step. Both are float64.
        """
        steps, since, rates, _, _ = tf.unstack(self._local[replica])
        return steps, tf.math.divide_no_nan(rates, since)

    def close(self, replica):
        """Begins a local replica's next mean."""
        self._local[replica][1:].assign(tf.zeros([4], tf.float64))

    def leave_out_nan(self, replica):
        """Takes what is not finite out of Keras' sums of a local replica.

        It would stay in all that is told from them to the end of the epoch, though the
        particle is put back into good health.
        """
        for total, count in self._keras_sums:
            sound = tf.math.is_finite(total[replica])
            for variable in count[replica], total[replica]:
                variable.assign(tf.where(sound, variable, 0))


def _sums(mean):
    """Returns the total and the count of a mean, [2]."""
    return tf.cast(tf.stack([mean.total.value, mean.count.value]), tf.float64)


def _num_rows(data):
    """Returns the rows of a batch, float64, 1 where it does not begin with a tensor."""
    first = next(part for part in tf.nest.flatten(data) if part is not None)
    if not isinstance(first, tf.Tensor) or not first.shape.rank:
        return tf.ones([], tf.float64)
    return tf.cast(tf.shape(first)[0], tf.float64)
