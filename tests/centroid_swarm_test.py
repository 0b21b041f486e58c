"""Tests of `tf_psops.CentroidSwarm` and of its peers that move a shared point."""

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import tf_psops

_TENSOR_IDS = (0, 0, 1)
_INF, _NAN = float("inf"), float("nan")


def _news(rule, vector, sync=0, scores=None):
    news = tf_psops.News(
        vector=tf.constant(vector),
        fitness=tf.zeros([4], tf.float64),
        particle=tf.constant(0),
        sync=tf.constant(sync),
        learning_rate=tf.constant(0.1, tf.float64),
        scores=None if scores is None else tf.constant(scores, tf.float64),
    )
    return news._replace(factors=rule.factors(news, 2))


class CentroidSwarmTest(tf.test.TestCase, parameterized.TestCase):
    def test_trials_fly_past_the_centroid(self):
        rule = tf_psops.CentroidSwarm(inertia=(0.5, 0.2))
        self.assertEqual(rule.num_trials, 2)
        state = rule.init(tf.constant([1.0, 2.0, 3.0], tf.float64))
        velocity = np.array([7.0, 8.0, 9.0])
        state = state._replace(velocity=tf.constant(velocity))
        mean = np.array([4.0, 5.0, 6.0])
        for number, inertia in enumerate((0.2, 0.5)):
            trial = rule.trial(number, state, _news(rule, mean), _TENSOR_IDS)
            self.assertAllClose(trial, mean + inertia * velocity)

    @parameterized.parameters(
        # Scores, and the inertias of where the swarm goes on and of its answer.
        ([1.0, 0.9, 0.8, 0.9], 0.7, 0.5),
        ([1.0, 1.01, 1.04, 1.06], 0.5, 0.0),
        ([1.0, 2.0, 1.05, 2.0], 0.5, 0.0),
        ([1.0, 2.0, 3.0, 4.0], 0.0, 0.0),
        ([1.0, _NAN, 0.5, _INF], 0.5, 0.5),
        ([-1.0, -0.97, -0.94, 0.0], 0.3, 0.0),
        ([_INF, 3.0, 2.0, 3.0], 0.5, 0.5),
        ([_INF] * 4, 0.0, 0.0),
    )
    def test_choice(self, scores, inertia, best_inertia):
        rule = tf_psops.CentroidSwarm(inertia=(0.3, 0.5, 0.7), tolerance=0.05)
        start, velocity = np.array([1.0, 0.0, 2.0]), np.array([10.0, 20.0, 30.0])
        state = rule.init(tf.constant(start))._replace(velocity=tf.constant(velocity))
        mean = np.array([4.0, 5.0, 6.0])
        # As `Synchronizer` hands scores on: what is not finite is infinite.
        scores = np.where(np.isfinite(scores), scores, _INF)
        move = tf.function(
            lambda *args: rule.move(*args, _TENSOR_IDS), jit_compile=True
        )
        state, moved = move(state, tf.zeros(3), _news(rule, mean, scores=scores))
        self.assertAllClose(moved, mean + inertia * velocity)
        self.assertAllClose(state.velocity, moved - start)
        self.assertAllClose(rule.agreed(state, mean), mean + best_inertia * velocity)

    def test_flies_like_numpy(self):
        """Against PSO of the centroid written out in NumPy, on a quadratic loss."""
        rule = tf_psops.CentroidSwarm(inertia=(0.3, 0.5, 0.7), tolerance=0.05)
        trial = tf.function(
            lambda *args: rule.trial(*args, _TENSOR_IDS), jit_compile=True
        )
        move = tf.function(
            lambda *args: rule.move(*args, _TENSOR_IDS), jit_compile=True
        )
        rng = np.random.default_rng(0)
        goal = rng.normal(size=3)
        x, v = np.zeros(3), np.zeros(3)
        state = rule.init(tf.constant(x))
        choices = []
        for sync in range(12):
            mean = x + 0.2 * (goal - x) + 0.1 * rng.normal(size=3)
            velocities = [w * v + (mean - x) for w in (0, 0.3, 0.5, 0.7)]
            losses = np.array([np.sum((x + u - goal) ** 2) for u in velocities])
            news = _news(rule, mean, sync)
            for k, u in enumerate(velocities[1:]):
                self.assertAllClose(trial(tf.constant(k), state, news), x + u)
            chosen = np.flatnonzero(losses <= 1.05 * losses[0])[-1]
            choices.append(chosen)
            best = x + velocities[np.argmin(losses)]
            v = velocities[chosen]
            x = x + v
            state, moved = move(
                state, tf.constant(rng.normal(size=3)), _news(rule, mean, sync, losses)
            )
            self.assertAllClose(moved, x)
            self.assertAllClose(state.velocity, v)
            self.assertAllClose(rule.agreed(state, mean), best)
        self.assertGreater(len(set(choices)), 2)

    @parameterized.parameters(
        dict(num_examples=32, batch_shape=[None], scored=[*range(8)]),
        dict(num_examples=3, batch_shape=[None], scored=[0, 1, 2, 4, 5, 6]),
        # A model of one batch size must get that.
        dict(num_examples=3, batch_shape=[4], scored=[*range(8)]),
    )
    def test_takes_the_trial_that_the_swarm_scores_best(
        self, num_examples, batch_shape, scored
    ):
        """Through `fit`: the choice is that of the latest batch of all particles."""
        rng = np.random.default_rng(1)
        x = rng.normal(size=[48, 5]).astype(np.float32)
        y = (x @ rng.normal(size=[5, 1]) + rng.normal(size=[48, 1])).astype(np.float32)
        dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
        start = rng.normal(size=[5, 1]).astype(np.float32)
        inertia = (0.1, 0.3, 0.5, 0.7, 0.9)

        def fit(rule, steps):
            strategy = tf_psops.SwarmStrategy.in_process(2)
            with strategy.scope():
                model = keras.Sequential(
                    [
                        keras.layers.Input(batch_shape=[*batch_shape, 5]),
                        keras.layers.Dense(1, use_bias=False),
                    ]
                )
                model.compile(keras.optimizers.SGD(0.2), loss="mse")
            model.set_weights([start])
            callbacks = [tf_psops.PSOSync(3, rule)]
            model.fit(dataset.take(steps), verbose=0, callbacks=callbacks)
            return model.get_weights()[0]

        # Plain SGD, and no velocity yet: the first synchronisation is an average.
        first, second = (fit(tf_psops.ParameterAverage(), steps) for steps in (3, 6))
        trials = [second + w * (first - start) for w in (0.0, *inertia)]

        def best_on(rows):
            errors = [x[40:][rows] @ w - y[40:][rows] for w in trials]
            return int(np.argmin([np.mean(error**2) for error in errors]))

        best = best_on(scored)
        self.assertNotEqual(best_on([*range(8)]), best_on([0, 1, 2, 4, 5, 6]))
        self.assertNotIn(best, (0, len(inertia)))
        rule = tf_psops.CentroidSwarm(inertia, num_examples=num_examples)
        moved = fit(rule, 6)
        self.assertAllClose(moved, trials[best], rtol=1e-5, atol=1e-6)

    @parameterized.parameters(
        ({"inertia": 0.5}, "inertia"),
        ({"inertia": (0.5, 1.0)}, "inertia"),
        ({"inertia": (0.0,)}, "inertia"),
        ({"inertia": ("x",)}, "inertia"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": _INF}, "tolerance"),
        ({"tolerance": None}, "tolerance"),
    )
    def test_refuses(self, arguments, name):
        with self.assertRaisesRegex(ValueError, f"`{name}`.*Received: {name}="):
            tf_psops.CentroidSwarm(**arguments)


class PeersTest(tf.test.TestCase, parameterized.TestCase):
    def test_elastic_average_like_numpy(self):
        rule = tf_psops.ElasticAverage(beta=0.8)
        rng = np.random.default_rng(0)
        x, c = rng.normal(size=[4, 3]), np.ones(3)
        states = [rule.init(tf.constant(c))] * 4
        for sync in range(3):
            x = x + rng.normal(size=x.shape)
            mean = x.mean(axis=0)
            moves = [
                rule.move(state, tf.constant(p), _news(rule, mean, sync), _TENSOR_IDS)
                for state, p in zip(states, x)
            ]
            x, c = x - 0.2 * (x - c), c + 0.8 * (mean - c)
            states = [state for state, _ in moves]
            self.assertAllClose([moved for _, moved in moves], x)
            for state in states:
                self.assertAllClose(rule.agreed(state, mean), c)

    @parameterized.parameters(
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
