"""Tests of `PSOSync(optimizer_slots="rescale")`."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops
from tests import swarms
from tf_psops.sync import second_moments


def _rescaled(moments):
    """Returns what the formula makes of each particle's second moments, [W, ...]."""
    matrices = moments.reshape(len(moments), -1, moments.shape[-1])
    if moments.ndim == 2:
        matrices = matrices.reshape(len(moments), -1, 1)

    def product(rows, columns):
        return np.outer(rows, columns) / max(rows.mean(), 1e-300)

    rows, columns = matrices.mean(2), matrices.mean(1)
    expected = product(rows.mean(0), columns.mean(0))
    made = []
    for matrix, row, column in zip(matrices, rows, columns):
        own = product(row, column)
        factor = expected / np.where(own > 0, own, 1)
        made.append(np.where(own > 0, matrix * factor, expected))
    return np.stack(made).reshape(moments.shape)


def _slots(model):
    """Returns the slots by name, [W, ...]."""
    return {
        slot.path: np.stack(swarms.local(model, slot)).astype(float)
        for slot in model.optimizer.variables
        if slot.shape
    }


class RescaleTest(tf.test.TestCase, parameterized.TestCase):
    def _fit(self, optimizer, steps=2, x=None, every=2, make=swarms.dense, **kwargs):
        model = swarms.swarm(optimizer=optimizer, make=make)
        sync = tf_psops.PSOSync(
            every, tf_psops.ParameterAverage(), optimizer_slots="rescale", **kwargs
        )
        data = swarms.arrays(steps)
        data = (data[0] if x is None else x, data[1])
        data = tf.data.Dataset.from_tensor_slices(data).batch(2 * swarms.ROWS)
        before, after = swarms.Probe(_slots), swarms.Probe(_slots)
        swarms.fit(model, data, before, sync, after)
        return before.seen, after.seen, sync

    @parameterized.parameters(
        keras.optimizers.Adam,
        lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.1),
        keras.optimizers.RMSprop,
        lambda rate: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(rate)),
    )
    def test_second_moments_alone_are_rescaled(self, optimizer):
        before, after, _ = self._fit(optimizer)
        seen = 0
        for path, own in before[1].items():
            if path.endswith("velocity"):
                self.assertFalse(swarms.equal(own))
                self.assertAllClose(after[1][path], _rescaled(own), rtol=1e-5)
                seen += 1
            else:
                self.assertAllEqual(after[1][path], own)
        self.assertEqual(seen, 2)

    def test_convolutions(self):
        def make():
            keras.utils.set_random_seed(1)
            reshape, convolution = layers.Reshape([2, 2, 1]), layers.Conv2D(3, 2)
            return keras.Sequential(
                [keras.Input([4]), reshape, convolution, layers.Flatten()]
            )

        before, after, _ = self._fit(keras.optimizers.Adam, make=make)
        (path,) = (p for p in before[1] if p.endswith("kernel_velocity"))
        self.assertEqual(before[1][path].shape, (2, 2, 2, 1, 3))
        self.assertAllClose(after[1][path], _rescaled(before[1][path]), rtol=1e-5)

    def test_scale_of_what_a_particle_has_never_seen(self):
        x, _ = swarms.arrays(2)
        x = x.reshape(2, 2, swarms.ROWS, 4)
        x[:, 1, :, 0] = 0  # The second particle never sees the first input.
        before, after, _ = self._fit(keras.optimizers.Adam, x=x.reshape(-1, 4))
        (path,) = (p for p in before[1] if p.endswith("kernel_velocity"))
        self.assertAllEqual(before[1][path][1, 0], np.zeros(3))
        self.assertAllInRange(after[1][path], 1e-12, 1)
        self.assertAllClose(after[1][path], _rescaled(before[1][path]), rtol=1e-5)

    def test_what_travels(self):
        _, _, sync = self._fit(keras.optimizers.Adam)
        model = swarms.swarm(optimizer=keras.optimizers.Adam)
        plain = tf_psops.PSOSync(2, tf_psops.ParameterAverage())
        swarms.fit(model, swarms.data(2), plain)
        # Rows and columns of the kernel, and of the bias in one column.
        self.assertEqual(sync.bytes_moved - plain.bytes_moved, 4 * (4 + 3 + 3 + 1))

    def test_nothing_to_rescale(self):
        before, after, sync = self._fit(
            lambda rate: keras.optimizers.SGD(rate, momentum=0.9)
        )
        self.assertNotEmpty(before[1])
        for path, own in before[1].items():
            self.assertAllEqual(after[1][path], own)
        self.assertEqual(sync.num_syncs, 1)

    def test_moments_stay_positive_where_they_travel_meanwhile(self):
        x, _ = swarms.arrays(9)
        x[: swarms.ROWS] *= 100
        _, after, sync = self._fit(
            lambda rate: keras.optimizers.RMSprop(rate, rho=0.5), 9, x, 4, delay=3
        )
        for slots in after:
            for path, values in slots.items():
                if path.endswith("velocity"):
                    self.assertAllInRange(values, 0.0, 1e9)
        self.assertEqual(sync.num_diverged, 0)


class SecondMomentsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(1.0, 1e-18)
    def test_of_rank_one_is_exact(self, scale):
        """Also where the product of the means underflows."""
        strategy = tf_psops.SwarmStrategy.in_process(2)
        with strategy.scope():
            slot = keras.Variable(np.zeros([3, 2]))
        copies = strategy.experimental_local_results(slot.value)
        rows, columns = np.array([1.0, 2.0, 6.0]), np.array([1.0, 4.0])
        copies[0].assign(scale * np.outer(rows, columns))
        moments = second_moments.SecondMoments(strategy, [slot.value], tf.float32)
        self.assertEqual((moments.size, moments.num_bytes), (5, 20))
        means = moments.pack(0)
        self.assertAllClose(
            means / scale, np.concatenate([rows * 2.5, columns * 3]), rtol=1e-6
        )
        for copy in copies:
            copy.assign(scale * 1e-4 * np.outer(rows[::-1], columns[::-1]))
        moments.unpack(1, means)
        self.assertAllClose(copies[1] / scale, np.outer(rows, columns), rtol=1e-5)


if __name__ == "__main__":
    tf.test.main()
