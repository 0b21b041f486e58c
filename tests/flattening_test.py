"""Tests of `tf_psops.sync.flattening`."""

import tensorflow as tf
from absl.testing import parameterized

import tf_psops
from tf_psops.sync import flattening


class PackingTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters("float32", "float64")
    def test_there_and_back(self, dtype):
        # Of 8 and 16 elements some begin and end where memory can be shared.
        shapes = [(3,), (4, 4), (), (2, 8), (5,), (8,)]
        strategy = tf_psops.SwarmStrategy.in_process(2)
        with strategy.scope():
            variables = [
                tf.Variable(tf.fill(shape, float(number)))
                for number, shape in enumerate(shapes)
            ]
        packed = flattening.Flattening(strategy, variables, tf.as_dtype(dtype))
        self.assertEqual(packed.size, 3 + 16 + 1 + 16 + 5 + 8)
        self.assertEqual(packed.num_bytes, packed.size * tf.as_dtype(dtype).size)
        self.assertAllEqual(packed.pack(0), packed.tensor_ids())
        vector = tf.range(packed.size, dtype=dtype)
        packed.unpack(1, vector)
        self.assertAllEqual(packed.pack(1), vector)
        self.assertAllEqual(packed.pack(0), packed.tensor_ids())
        for number, variable in enumerate(variables):
            _, changed = strategy.experimental_local_results(variable)
            ids = tf.reshape(packed.tensor_ids() == number, [-1])
            self.assertAllEqual(tf.reshape(changed, [-1]), vector[ids])

    def test_nothing(self):
        strategy = tf_psops.SwarmStrategy.in_process(1)
        packed = flattening.Flattening(strategy, [], tf.float32)
        packed.unpack(0, packed.pack(0))
        self.assertEqual(packed.pack(0).shape, [0])
        self.assertEqual(packed.tensor_ids().shape, [0])


if __name__ == "__main__":
    tf.test.main()
