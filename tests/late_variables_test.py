"""Tests of what the training step of several workers makes, or moves, by itself."""

import clusters
import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops

_STEPS = 4
_ROWS = 2  # Of each worker in a step.


class Adversaries(keras.Model):
    """Two parts with an optimizer each, as a GAN, and a teacher of one of them.

    All of it is built in the first training step.
    """

    def __init__(self, rate):
        super().__init__()
        self.first = keras.Sequential([layers.Dense(5, "tanh"), layers.Dropout(0.2)])
        self.second = keras.Sequential([layers.Dense(1)])
        self.teacher = keras.Sequential([layers.Dense(5, trainable=False)])
        self.optimizers = [
            keras.optimizers.Adam(rate),
            keras.optimizers.SGD(rate, momentum=0.9),
        ]

    def train_step(self, x):
        self.teacher(x)
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean(self.second(self.first(x, training=True)) ** 2)
        for optimizer, part in zip(self.optimizers, (self.first, self.second)):
            weights = part.trainable_variables
            optimizer.apply(tape.gradient(loss, weights), weights)
        for average, weight in zip(self.teacher.weights, self.first.weights):
            average.assign(0.8 * average + 0.2 * weight)
        return {"loss": loss}

    def floats(self):
        """Returns weights, and then slots, as this worker has them."""
        slots = [v for optimizer in self.optimizers for v in optimizer.variables[2:]]
        return [v.numpy() for v in (*self.weights, *slots) if "seed" not in v.path]


class _Note(keras.callbacks.Callback):
    """Keeps a worker's floats when training begins and after its first step."""

    def on_train_begin(self, logs=None):
        self.begun = self.model.floats()

    def on_train_batch_end(self, batch, logs=None):
        if batch == 0:
            self.first = self.model.floats()

    def on_epoch_end(self, epoch, logs=None):
        if self.model.distribute_strategy.worker_index == 1:
            self.model.second.layers[0].bias.assign([4.0])


def _train(rate, eagerly):
    """Trains twice, and returns for each training what `_Note` has, and the end."""
    strategy = tf_psops.SwarmStrategy(startup_timeout=60, timeout=60)
    keras.utils.set_random_seed(strategy.worker_index)
    with strategy.scope():
        model = Adversaries(rate)
        model.compile("sgd", run_eagerly=eagerly)
    x = np.random.default_rng(0).normal(size=[_STEPS * 2 * _ROWS, 4])
    results = []
    for _ in range(2):
        note = _Note()
        sync = tf_psops.PSOSync(
            2, tf_psops.ParameterAverage(), optimizer_slots="average"
        )
        model.fit(
            x, batch_size=2 * _ROWS, shuffle=False, verbose=0, callbacks=[note, sync]
        )
        results.append((note.begun, note.first, model.floats()))
    return results


class LateVariablesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(False, True)
    def test_variables_of_the_first_step(self, eagerly):
        one, other = clusters.run(_train, 2, 0.1, eagerly, timeout=120)
        (_, first, ended), (begun, _, ended_again) = one
        (_, first_other, ended_other), (begun_other, _, ended_again_other) = other
        self.assertLen(ended, 12)
        # Nobody's first step is lost: each has moved by its own rows.
        for mine, others in zip(first, first_other, strict=True):
            self.assertNotAllEqual(mine, others)
        for mine, others in (
            (ended, ended_other),
            (begun, begun_other),
            (ended_again, ended_again_other),
            (ended, begun),
        ):
            for value, another in zip(mine, others, strict=True):
                self.assertAllEqual(value, another)
        # Set on one of two workers after the last synchronisation.
        self.assertAllGreater(ended[3], 1.0)

    @parameterized.parameters(False, True)
    def test_they_begin_with_the_chiefs_values(self, eagerly):
        one, other = clusters.run(_train, 2, 0.0, eagerly, timeout=120)
        for value, another in zip(one[0][1][:6], other[0][1][:6], strict=True):
            self.assertAllEqual(value, another)


if __name__ == "__main__":
    tf.test.main()
