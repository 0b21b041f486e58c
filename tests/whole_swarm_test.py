"""Tests that what has no mean, and what steps return, is the whole swarm's."""

import clusters
import keras
import numpy as np
import swarms
import tensorflow as tf
from absl.testing import parameterized
from keras import layers, ops

import tf_psops


class Counts(keras.Model):
    """Counts rows, and returns losses that no metric knows, one of them per class."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.seen = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.ever = tf.Variable([False] * 3, trainable=False)

    def call(self, x):
        return self.dense(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(y, self(x), True)
            loss = ops.mean(losses)
        self.optimizer.apply(
            tape.gradient(loss, self.trainable_variables), self.trainable_variables
        )
        self.seen.assign_add(tf.math.count_nonzero(x[:, 0] > 0))
        self.ever.assign(self.ever | tf.cast(ops.any(x > 1, axis=0)[:3], bool))
        return {"loss": loss, "largest": ops.max(losses), "rows": ops.shape(x)[0]}

    def test_step(self, data):
        x, y = data
        losses = keras.losses.sparse_categorical_crossentropy(y, self(x), True)
        return {"loss": ops.mean(losses)}


def _made(strategy):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = Counts()
        model.build((None, 4))
        model.compile(keras.optimizers.SGD(0.1))
    return model


def _train(strategy):
    model = _made(strategy)
    x, y = swarms.arrays(5)
    callbacks = []
    if isinstance(strategy, tf_psops.SwarmStrategy):
        callbacks = [tf_psops.PSOSync(1, tf_psops.ParameterAverage())]
    history = model.fit(
        x, y, batch_size=4, shuffle=False, verbose=0, epochs=2, callbacks=callbacks,
        validation_data=(x, y),
    ).history  # fmt: skip
    loss = model.evaluate(x, y, batch_size=4, verbose=0)
    states = [
        [copy.numpy().tolist() for copy in strategy.experimental_local_results(v)]
        for v in (model.seen, model.ever)
    ]
    return {name: np.array(v) for name, v in history.items()}, loss, states


def _on_worker():
    return _train(tf_psops.SwarmStrategy())


class WholeSwarmTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(1, 2)
    def test_history_and_counts(self, workers):
        plain, loss, _ = _train(tf.distribute.get_strategy())
        if workers == 1:
            results = [_train(tf_psops.SwarmStrategy.in_process(2))]
        else:
            results = clusters.run(_on_worker, 2, timeout=120)
        for history, found_loss, _ in results:
            for name in ("loss", "val_loss"):
                self.assertAllClose(history[name], plain[name], rtol=1e-5)
            self.assertAllEqual(history["largest"], results[0][0]["largest"])
            self.assertAllClose(found_loss, loss, rtol=1e-5)
        states = [copies for _, _, copies in results]
        seen, ever = ([c for s in states for c in s[i]] for i in range(2))
        self.assertLen(seen, 2)
        self.assertEqual(seen[0], seen[1])
        self.assertEqual(ever[0], ever[1])
        x, _ = swarms.arrays(5)
        # The first particle's.
        self.assertEqual(seen[0], 2 * (x.reshape(5, 2, 2, 4)[:, 0, :, 0] > 0).sum())


if __name__ == "__main__":
    tf.test.main()
