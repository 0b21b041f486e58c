"""Tests that sums over the rows are told from means by the graph of a loss."""

import tensorflow as tf
from absl.testing import parameterized
from keras import layers, ops

from tf_psops.batches import sums_of_rows

_SUMS = {
    "sum": (lambda x: ops.sum(x), 1.0),
    "scaled": (lambda x: 0.3 * ops.sum(x) / 2.5, 0.12),
    "subtracted": (lambda x: ops.mean(x) - ops.sum(x), -1.0),
    "of_squares": (lambda x: tf.nn.l2_loss(x), 1.0),
    "by_features": (lambda x: ops.sum(ops.sum(x, axis=0)), 1.0),
    "mean_of_features": (lambda x: ops.mean(ops.sum(x, axis=0)), 0.2),
    "of_features": (lambda x: ops.sum(ops.sum(x, axis=1)), 1.0),
    "in_a_list": (lambda x: ops.sum(ops.stack([ops.sum(x), ops.mean(x)])), 1.0),
    "of_losses": (lambda x: ops.sum(x, axis=1), 1.0),
    "of_more_rows": (lambda x: ops.sum(ops.concatenate([x, 2 * x])), 1.0),
    "transposed": (lambda x: ops.sum(ops.transpose(ops.transpose(x))), 1.0),
    "recurrent": (lambda x: ops.sum(_RECURRENT(x[:, :, None])), 1.0),
    "random": (lambda x: ops.sum(x * tf.random.normal(tf.shape(x))), 1.0),
}
_MEANS = {
    "mean": lambda x: ops.mean(x),
    "of_sums": lambda x: ops.mean(ops.sum(x, axis=1)),
    "divided": lambda x: ops.sum(x) / tf.cast(tf.shape(x)[0], x.dtype),
    "by_size": lambda x: ops.sum(x) / tf.cast(tf.size(x), x.dtype),
    "by_length": lambda x: ops.sum(x) / x.shape[0] if x.shape[0] else ops.mean(x),
    "masked": lambda x: ops.sum(x * (x > 0)) / (ops.sum(x > 0) + 1),
    "of_features": lambda x: ops.sum(ops.mean(x, axis=0)),
    "of_steps": lambda x: ops.sum(ops.mean(_RECURRENT(x[:, :, None]), axis=0)),
    "of_gram": lambda x: ops.sum(ops.mean(x[:, :, None] * x[:, None], axis=0) ** 2),
    "of_weights": lambda x: ops.mean(x) + ops.sum(_WEIGHTS @ tf.transpose(_WEIGHTS)),
    "power": lambda x: ops.sqrt(ops.sum(x)),
    "none": lambda x: ops.convert_to_tensor(1.0),
}
_WEIGHTS = tf.Variable(tf.ones([4, 5]))
_RECURRENT = layers.GRU(2, return_sequences=True)
_RECURRENT.build([None, 5, 1])


class SumsOfRowsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(name=tuple(_SUMS), rows=(None, 4))
    def test_sum(self, name, rows):
        loss, factor = _SUMS[name]
        (found,) = _found(loss, rows)
        self.assertAlmostEqual(found, factor, places=6)

    @parameterized.product(name=tuple(_MEANS), rows=(None, 4))
    def test_mean(self, name, rows):
        self.assertEmpty(_found(_MEANS[name], rows))


def _found(loss, rows):
    """Returns the factors of the sums that are found in a function of a batch."""

    @tf.function(autograph=False)
    def traced(x):
        found = sums_of_rows.find(loss(x), rows, lambda tensor: False)
        return [tf.convert_to_tensor(factor, tf.float32) for _, factor in found]

    concrete = traced.get_concrete_function(tf.TensorSpec([rows, 5], tf.float32))
    return [float(factor) for factor in concrete(tf.ones([4, 5]))]


if __name__ == "__main__":
    tf.test.main()
