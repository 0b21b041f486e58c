"""Tests of the rules with outer momentum, and of the learning rate they are told."""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import tf_psops
from tests import swarms


def _fly(rule, means, rates):
    """Returns where a rule goes from a start at the means that it is told."""
    state = rule.init(tf.zeros([3], tf.float64))
    flown = []
    for mean, rate in zip(means, rates):
        news = tf_psops.News(
            tf.constant(mean), None, None, None, tf.constant(rate, tf.float64), None
        )
        state, moved = rule.move(state, None, news, None)
        np.testing.assert_array_equal(rule.agreed(state, news.vector), moved)
        flown.append(moved)
    return np.stack(flown)


class SlowMomentumTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        inertia=(0.0, 0.3, 0.9), rates=([0.1] * 5, [0.1, 0.4, 0.2, 0.02, 0.0])
    )
    def test_algorithm_1(self, inertia, rates):
        """In the paper's own variables: u is a gradient."""
        means = np.random.default_rng(0).normal(size=[5, 3])
        x, u, expected = np.zeros(3), np.zeros(3), []
        for mean, rate in zip(means, rates):
            if rate:
                u = inertia * u + (x - mean) / rate
                x = x - rate * u
            else:
                x = mean
            expected.append(x)
        flown = _fly(tf_psops.SlowMomentum(inertia), means, rates)
        self.assertAllClose(flown, expected, rtol=1e-9)
        if not inertia:
            self.assertAllClose(flown, means)

    def test_starts_at_a_rate_of_zero(self):
        means = np.random.default_rng(0).normal(size=[3, 3])
        flown = _fly(tf_psops.SlowMomentum(0.5), means, [0.0, 0.1, 0.1])
        self.assertAllClose(flown[:2], means[:2])
        self.assertAllClose(flown[2], means[2] + 0.5 * (means[1] - means[0]))

    @parameterized.parameters(1.0, "x", -0.1, float("nan"))
    def test_refuses(self, value):
        with self.assertRaisesRegex(ValueError, f"Received: inertia={value!r}"):
            tf_psops.SlowMomentum(inertia=value)


class DiLoCoTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(({},), ({"learning_rate": 0.3, "momentum": 0.5},))
    def test_is_keras_nesterov_on_the_way(self, constants):
        means = np.random.default_rng(0).normal(size=[5, 3])
        x, expected = keras.Variable(np.zeros(3), dtype="float64"), []
        rate, momentum = {"learning_rate": 0.7, "momentum": 0.9, **constants}.values()
        outer = keras.optimizers.SGD(rate, momentum=momentum, nesterov=True)
        for mean in means:
            outer.apply([x.numpy() - mean], [x])
            expected.append(x.numpy())
        flown = _fly(tf_psops.DiLoCo(**constants), means, np.ones(5))
        self.assertAllClose(flown, expected, rtol=1e-6)

    def test_by_hand(self):
        means = np.array([[1.0, 0.0, -2.0], [2.0, 0.0, 0.0]])
        first, second = _fly(tf_psops.DiLoCo(0.5, 0.5), means, np.ones(2))
        # The way is the mean; .5*(1 + .5)
        self.assertAllClose(first, 0.75 * means[0])
        way = means[1] - first
        self.assertAllClose(second, first + 0.5 * (way + 0.5 * (0.5 * means[0] + way)))

    @parameterized.parameters(
        ("learning_rate", 0.0),
        ("learning_rate", float("inf")),
        ("learning_rate", "x"),
        ("momentum", 1.0),
        ("momentum", -0.1),
    )
    def test_refuses(self, name, value):
        with self.assertRaisesRegex(ValueError, f"Received: {name}={value!r}"):
            tf_psops.DiLoCo(**{name: value})


class _State(NamedTuple):
    rates: tf.Tensor


class _Rates(tf_psops.Rule):
    """Moves all weights to the learning rate that it is told."""

    def init(self, position):
        return _State(tf.zeros_like(position))

    def move(self, state, position, news, tensor_ids):
        rates = tf.zeros_like(position) + news.learning_rate
        return _State(rates), rates

    def agreed(self, state, vector):
        return state.rates


class LearningRateTest(tf.test.TestCase, parameterized.TestCase):
    def _rates(self, optimizer, **kwargs):
        """Returns what a rule is told at syncs after steps 3, 6 and 8."""
        strategy = tf_psops.SwarmStrategy.in_process(2)
        with strategy.scope():
            model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
            model.compile(optimizer(), "mse", **kwargs)
        x, y = swarms.arrays(8)
        probe = swarms.Probe(lambda model: swarms.weights(model)[:, 0])
        swarms.fit(
            model,
            tf.data.Dataset.from_tensor_slices((x, y)).batch(4),
            *(tf_psops.PSOSync(3, _Rates()), probe),
        )
        every = 3 // model.steps_per_execution
        synced = probe.seen[every - 1 :: every][:2]
        return np.stack([*synced, swarms.weights(model)[:, 0]])

    @parameterized.named_parameters(
        ("variable", lambda: keras.optimizers.SGD(0.25)),
        ("function", lambda: keras.optimizers.SGD(lambda: tf.constant(0.25))),
        ("wrapped", lambda: _scaled(keras.optimizers.SGD(0.25))),
    )
    def test_constant(self, optimizer):
        self.assertAllClose(self._rates(optimizer), np.full([3, 2], 0.25))

    @parameterized.named_parameters(
        ("bare", lambda inner: inner), ("wrapped", lambda inner: _scaled(inner))
    )
    def test_mean_of_a_schedule(self, wrap):
        def make():
            falling = keras.optimizers.schedules.PolynomialDecay(0.8, 8, 0.0)
            return wrap(keras.optimizers.SGD(falling))

        # .8, .7, .6 and .5, .4, .3 and .2, .1.
        expected = np.transpose([[0.7, 0.4, 0.15]] * 2)
        self.assertAllClose(self._rates(make), expected)

    def test_boundary_of_a_schedule_at_a_synchronisation(self):
        def make():
            steps = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.5, 0.25])
            return keras.optimizers.SGD(steps)

        expected = np.transpose([[0.5, 0.25, 0.25]] * 2)
        self.assertAllClose(self._rates(make), expected)

    def test_several_steps_at_once(self):
        def make():
            falling = keras.optimizers.schedules.PolynomialDecay(0.8, 8, 0.0)
            return keras.optimizers.Adam(falling)

        rates = self._rates(make, steps_per_execution=3)
        self.assertAllClose(rates, np.transpose([[0.7, 0.4, 0.15]] * 2))


def _scaled(optimizer):
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0)


if __name__ == "__main__":
    tf.test.main()
