"""Tests that sums over the rows are told from means by the graph of a loss."""

import tensorflow as tf
from absl.testing import parameterized
from keras import layers, ops

from tf_psops import tensorflow_internals
from tf_psops.batches import sums_of_rows
from tf_psops.batches.sums_of_rows import Kind

_SUMS = {
    "sum": lambda x: ops.sum(x),
    "scaled": lambda x: 0.3 * ops.sum(x) / 2.5,
    "subtracted": lambda x: ops.mean(x * 0) - ops.sum(x),
    "of_squares": lambda x: tf.nn.l2_loss(x),
    "by_features": lambda x: ops.sum(ops.sum(x, axis=0)),
    "mean_of_features": lambda x: ops.mean(ops.sum(x, axis=0)),
    "of_features": lambda x: ops.sum(ops.sum(x, axis=1)),
    "in_a_list": lambda x: ops.sum(ops.stack([ops.sum(x), ops.mean(x * 0)])),
    "of_losses": lambda x: ops.sum(x, axis=1),
    "of_more_rows": lambda x: ops.sum(ops.concatenate([x, 2 * x])),
    "transposed": lambda x: ops.sum(ops.transpose(ops.transpose(x))),
    "recurrent": lambda x: ops.sum(_RECURRENT(x[:, :, None])),
    "random": lambda x: ops.sum(x * tf.random.normal(tf.shape(x))),
    "scaled_by_a_weight": lambda x: ops.exp(_WEIGHTS[0, 0]) * ops.sum(x),
    "transposed_once": lambda x: ops.sum(ops.transpose(x)),
    "flat": lambda x: ops.sum(ops.reshape(x, [-1])),
    "of_a_function": lambda x: 2 * tf.function(_scaled)(x),
    "of_a_function_of_rows": lambda x: ops.sum(tf.function(_last)(x)),
    "of_functions": lambda x: tf.function(tf.function(ops.sum))(x),
    "of_branches": lambda x: tf.cond(_FLAG, lambda: ops.sum(x), lambda: ops.sum(2 * x)),
    "through_a_branch": lambda x: _through_a_branch(ops.sum(x)),
}
_OTHERS = {
    "root": lambda x: ops.sqrt(ops.sum(x)),
    "root_of_a_mean": lambda x: ops.sqrt(ops.mean(x**2)),
    "norm": lambda x: tf.norm(x),
    "largest": lambda x: ops.max(x),
    "logarithm": lambda x: ops.log(ops.mean(x)),
    "product_of_means": lambda x: ops.mean(x) * ops.mean(x**2),
    "scaled_by_values": lambda x: ops.mean(x) * tf.stop_gradient(ops.max(x)),
    "cosine": lambda x: ops.sum(x) / ops.sqrt(ops.sum(x**2)),
    "scalar_product": lambda x: tf.tensordot(x[:, 0], x[:, 1], 1),
    "gram": lambda x: tf.linalg.trace(tf.matmul(x, x, transpose_a=True)),
    "gram_of_features": lambda x: ops.sum(
        ops.mean(x[:, :, None] * x[:, None], axis=0) ** 2
    ),
    "contrastive": lambda x: ops.mean(ops.logsumexp(x @ ops.transpose(x), axis=1)),
    "free_bits": lambda x: ops.maximum(ops.mean(x), 0.5),
    "one_row": lambda x: ops.sum(x[0]),
    "one_of_features": lambda x: ops.sum(x, axis=0)[2],
    "in_a_function": lambda x: tf.function(ops.max)(x),
    "in_a_branch": lambda x: tf.cond(_FLAG, lambda: ops.max(x), lambda: 0.0),
}
_MIXED = {
    "function": lambda x: tf.function(lambda x: ops.sum(x) + ops.mean(x))(x),
    "branches": lambda x: tf.cond(_FLAG, lambda: ops.sum(x), lambda: ops.mean(x)),
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
    "of_products": lambda x: ops.sum(ops.mean(x[:, :, None] * x[:, None], axis=0)),
    "of_weights": lambda x: ops.mean(x) + ops.sum(_WEIGHTS @ tf.transpose(_WEIGHTS)),
    "masked_safely": lambda x: ops.sum(x * (x > 0)) / ops.maximum(ops.sum(x > 0), 1),
    "weighted": lambda x: ops.sum(x * x[:, :1]) / (ops.sum(x[:, :1]) + 1e-7),
    "by_reciprocal": lambda x: ops.sum(x) * (1 / tf.cast(tf.shape(x)[0], x.dtype)),
    "one_of_features": lambda x: ops.mean(x, axis=0)[2],
    "weighted_features": lambda x: ops.sum(ops.arange(5.0) * ops.mean(x, axis=0)),
    "of_a_function": lambda x: tf.function(ops.mean)(x),
    "of_a_branch": lambda x: tf.cond(_FLAG, lambda: ops.mean(x), lambda: 0.0),
    "of_attention": lambda x: ops.mean(_ATTENTION(*([x[:, :, None]] * 2))),
    "stopped": lambda x: ops.mean(x) + tf.stop_gradient(ops.max(x)),
    "distances_to_weights": lambda x: ops.mean((x @ tf.transpose(_WEIGHTS)) ** 2),
    "penalty": lambda x: ops.mean(_slope(x) ** 2),
    "none": lambda x: ops.convert_to_tensor(1.0),
}
_WEIGHTS = tf.Variable(tf.ones([4, 5]))
_FLAG = tf.Variable(True)
_RECURRENT = layers.GRU(2, return_sequences=True)
_RECURRENT.build([None, 5, 1])
_ATTENTION = layers.MultiHeadAttention(1, 2)
_ATTENTION.build([None, 5, 1], [None, 5, 1])


def _scaled(x):
    return 0.3 * ops.sum(x)


def _last(x):
    return x[:, -1]


def _through_a_branch(loss):
    return tf.cond(_FLAG, lambda: loss, lambda: 0.0)


def _slope(x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.tanh(x @ tf.transpose(_WEIGHTS))
    return tape.gradient(y, x)


class SumsOfRowsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(name=tuple(_SUMS), rows=(None, 4))
    def test_sum(self, name, rows):
        kinds, found, whole = _found(_SUMS[name], rows)
        self.assertAllClose(found, whole)
        self.assertLessEqual(kinds, {Kind.SUM, Kind.MEAN})

    @parameterized.product(name=tuple(_MEANS), rows=(None, 4))
    def test_mean(self, name, rows):
        kinds, *_ = _found(_MEANS[name], rows)
        self.assertLessEqual(kinds, {Kind.MEAN})

    @parameterized.product(name=tuple(_OTHERS), rows=(None, 4))
    def test_other(self, name, rows):
        kinds, *_ = _found(_OTHERS[name], rows)
        self.assertContainsSubset({Kind.OTHER}, kinds)

    @parameterized.product(name=tuple(_MIXED), rows=(None, 4))
    def test_mixed(self, name, rows):
        kinds, *_ = _found(_MIXED[name], rows)
        self.assertEqual(kinds, {Kind.MIXED})


def _found(loss, rows):
    """Returns the kinds of a loss' parts, the value of the sums, and the loss."""
    kinds = set()

    @tf.function(autograph=False)
    def traced(x):
        value = loss(x)
        parts = sums_of_rows.find(
            value, rows, lambda tensor: False, tensorflow_internals.inside
        )
        kinds.update(part.kind for part in parts)
        sums = [
            part.factor() * tf.reduce_sum(part.tensor)
            for part in parts
            if part.kind is Kind.SUM
        ]
        return tf.reduce_sum(sums), tf.reduce_sum(value)

    concrete = traced.get_concrete_function(tf.TensorSpec([rows, 5], tf.float32))
    return kinds, *concrete(tf.reshape(tf.range(20.0), [4, 5]))


if __name__ == "__main__":
    tf.test.main()
