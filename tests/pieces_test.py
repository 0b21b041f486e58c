"""Tests of sums over long vectors."""

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from tf_psops import _pieces


class PiecesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        size=(0, 5, 1 << 16, (1 << 16) + 3, 9 << 16), dtype=(np.float32, np.float64)
    )
    def test_adds_up_all_elements(self, size, dtype):
        rng = np.random.default_rng(0)
        one, other = rng.integers(-9, 9, size=[2, size]).astype(dtype)

        @tf.function
        def add(one, other):
            return _pieces.add(
                lambda *pieces: [
                    tf.reduce_sum(pieces[0] * pieces[1]),
                    tf.size(pieces[1]),
                ],
                one,
                other,
            )

        product, count = add(tf.constant(one), tf.constant(other))
        self.assertEqual([product, count], [one @ other, size])


if __name__ == "__main__":
    tf.test.main()
