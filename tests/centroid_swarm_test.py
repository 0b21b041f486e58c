"""Tests of `tf_psops.CentroidSwarm` and of its peers that move a shared point."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import tf_psops

_SIZES = (2, 1)
_INF = float("inf")


def _news(rule, vector, sync=0, scores=None):
    news = tf_psops.News(
        vector=tf.constant(vector),
        fitness=tf.zeros([4], tf.float64),
        particle=tf.constant(0),
        sync=tf.constant(sync),
        scores=None if scores is None else tf.constant(scores, tf.float64),
    )
    return news._replace(factors=rule.factors(news, len(_SIZES)))


def _factors(rule, sync):
    return _news(rule, np.zeros(3), sync).factors.numpy()


class CentroidSwarmTest(tf.test.TestCase, parameterized.TestCase):
    def test_first_trial_is_the_centroid(self):
        rule = tf_psops.CentroidSwarm(trials=3)
        state = rule.init(tf.constant([1.0, 2.0, 3.0], tf.float64))
        state = state._replace(velocity=tf.constant([9.0, 9.0, 9.0], tf.float64))
        mean = np.array([4.0, 5.0, 6.0])
        self.assertAllClose(rule.trial(0, state, _news(rule, mean), _SIZES), mean)

    def test_factors_depend_on_seed_and_sync_alone(self):
        rule = tf_psops.CentroidSwarm(trials=64, inertia=0.7, social=(0.5, 1.5))
        factors = _factors(rule, sync=3)
        self.assertAllEqual(factors[0], [0.0, 1.0])
        self.assertAllInRange(factors[1:, 0], 0.0, 0.7)
        self.assertAllInRange(factors[1:, 1], 0.5, 1.5)
        self.assertGreater(np.ptp(factors[1:, 0]), 0.5)
        self.assertGreater(np.ptp(factors[1:, 1]), 0.8)
        news = _news(rule, np.zeros(3), sync=3)
        of_another = rule.factors(news._replace(particle=tf.constant(2)), len(_SIZES))
        self.assertAllEqual(of_another, factors)
        self.assertNotAllEqual(_factors(rule, sync=4), factors)
        other = tf_psops.CentroidSwarm(trials=64, inertia=0.7, seed=1)
        self.assertNotAllEqual(_factors(other, sync=3), factors)

    def test_flies_like_numpy(self):
        """Against PSO of the centroid written out in NumPy, on a quadratic loss."""
        rule = tf_psops.CentroidSwarm(trials=5, seed=2)
        trial = tf.function(lambda *args: rule.trial(*args, _SIZES), jit_compile=True)
        move = tf.function(lambda *args: rule.move(*args, _SIZES), jit_compile=True)
        rng = np.random.default_rng(0)
        goal = rng.normal(size=3)
        g, v = np.zeros(3), np.zeros(3)
        state = rule.init(tf.constant(g))
        choices = []
        for sync in range(8):
            mean = g + 0.2 * (goal - g) + 0.1 * rng.normal(size=3)
            factors = _factors(rule, sync).astype(np.float64)
            velocities = [w * v + c * (mean - g) for w, c in factors]
            losses = [np.sum((g + u - goal) ** 2) for u in velocities]
            news = _news(rule, mean, sync)
            for k, u in enumerate(velocities):
                self.assertAllClose(trial(tf.constant(k), state, news), g + u)
            best = int(np.argmin(losses))
            choices.append(best)
            v = velocities[best]
            g = g + v
            state, moved = move(
                state, tf.constant(rng.normal(size=3)), _news(rule, mean, sync, losses)
            )
            self.assertAllClose(moved, g)
            self.assertAllClose(state.velocity, v)
            self.assertAllClose(rule.agreed(state, mean), g)
        self.assertGreater(len(set(choices)), 1)

    def test_averages_where_no_trial_has_a_finite_score(self):
        rule = tf_psops.CentroidSwarm(trials=4)
        state = rule.init(tf.zeros([3]))
        state = state._replace(velocity=tf.ones([3]))
        mean = np.array([1.0, 2.0, 3.0], np.float32)
        _, moved = rule.move(
            state, tf.zeros([3]), _news(rule, mean, scores=[_INF] * 4), _SIZES
        )
        self.assertAllClose(moved, mean)

    def test_takes_the_trial_that_the_swarm_scores_best(self):
        """Through `fit`: the choice is that of the latest batch of all particles."""
        rng = np.random.default_rng(1)
        x = rng.normal(size=[24, 5]).astype(np.float32)
        y = (x @ rng.normal(size=[5, 1])).astype(np.float32)
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        start = rng.normal(size=[5, 1]).astype(np.float32)

        def fit(rule):
            strategy = tf_psops.SwarmStrategy.in_process(2)
            with strategy.scope():
                model = keras.Sequential(
                    [keras.layers.Input([5]), keras.layers.Dense(1, use_bias=False)]
                )
                model.compile(keras.optimizers.SGD(0.3), loss="mse")
            model.set_weights([start])
            model.fit(dataset, verbose=0, callbacks=[tf_psops.PSOSync(3, rule)])
            return model.get_weights()[0]

        mean = fit(tf_psops.ParameterAverage())
        for seed in range(4):
            rule = tf_psops.CentroidSwarm(trials=6, social=(0.1, 3.0), seed=seed)
            trials = [start + c * (mean - start) for _, c in _factors(rule, 0)]
            losses = [np.mean((x[16:] @ w - y[16:]) ** 2) for w in trials]
            expected = trials[int(np.argmin(losses))]
            with self.subTest(seed=seed, chosen=int(np.argmin(losses))):
                self.assertAllClose(fit(rule), expected, rtol=1e-5, atol=1e-6)

    @parameterized.parameters(
        ({"trials": 0}, "trials"),
        ({"trials": 2.5}, "trials"),
        ({"inertia": 1.0}, "inertia"),
        ({"inertia": -0.1}, "inertia"),
        ({"social": 1.0}, "social"),
        ({"social": (1.5, 0.5)}, "social"),
        ({"social": (0.0, 1.0)}, "social"),
        ({"seed": 1.5}, "seed"),
    )
    def test_refuses(self, arguments, name):
        with self.assertRaisesRegex(ValueError, f"`{name}`.*Received: {name}="):
            tf_psops.CentroidSwarm(**arguments)


class PeersTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(0.0, 0.3, 0.9)
    def test_slow_momentum_like_numpy(self, inertia):
        rule = tf_psops.SlowMomentum(inertia)
        g, v = np.array([1.0, -1.0, 2.0]), np.zeros(3)
        state = rule.init(tf.constant(g))
        for sync, mean in enumerate(np.random.default_rng(0).normal(size=[5, 3])):
            v = inertia * v + (mean - g)
            g = g + v
            state, moved = rule.move(
                state, tf.zeros([3], tf.float64), _news(rule, mean, sync), _SIZES
            )
            self.assertAllClose(moved, g)
            self.assertAllClose(rule.agreed(state, mean), g)
            if not inertia:
                self.assertAllClose(moved, mean)

    def test_elastic_average_like_numpy(self):
        rule = tf_psops.ElasticAverage(beta=0.8)
        rng = np.random.default_rng(0)
        x, c = rng.normal(size=[4, 3]), np.ones(3)
        states = [rule.init(tf.constant(c))] * 4
        for sync in range(3):
            x = x + rng.normal(size=x.shape)
            mean = x.mean(axis=0)
            moves = [
                rule.move(state, tf.constant(p), _news(rule, mean, sync), _SIZES)
                for state, p in zip(states, x)
            ]
            x, c = x - 0.2 * (x - c), c + 0.8 * (mean - c)
            states = [state for state, _ in moves]
            self.assertAllClose([moved for _, moved in moves], x)
            for state in states:
                self.assertAllClose(rule.agreed(state, mean), c)

    @parameterized.parameters(
        (tf_psops.SlowMomentum, "inertia", 1.0),
        (tf_psops.SlowMomentum, "inertia", "x"),
        (tf_psops.ElasticAverage, "beta", 0.0),
        (tf_psops.ElasticAverage, "beta", 1.1),
    )
    def test_refuses(self, rule, name, value):
        with self.assertRaisesRegex(
            ValueError, f"`{name}`.*Received: {name}={value!r}"
        ):
            rule(**{name: value})


if __name__ == "__main__":
    tf.test.main()
