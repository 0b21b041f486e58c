"""Tests of `tf_psops.CentroidSwarm` and of its peers that move a shared point."""

import functools

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import tf_psops
from tf_psops.sync import compiled_rule

_TENSOR_IDS = (0, 0, 1)
_INF, _NAN = float("inf"), float("nan")


def _news(vector, distances=(0.0,) * 4):
    return tf_psops.News(
        vector=tf.constant(vector),
        fitness=tf.zeros([len(distances)], tf.float64),
        particle=tf.constant(0),
        sync=tf.constant(0),
        learning_rate=tf.constant(0.1, tf.float64),
        distances=tf.constant(distances, tf.float64),
    )


def _factors(rule, state, news):
    return compiled_rule.CompiledRule(rule).factors(state, news, num_tensors=2)


def _compiled(rule):
    """Returns what moves a particle as a swarm does."""
    move = tf.function(lambda *args: rule.move(*args, _TENSOR_IDS), jit_compile=True)
    factors = tf.function(functools.partial(_factors, rule))

    def moved(state, position, news):
        return move(state, position, news._replace(factors=factors(state, news)))

    return moved


def _lengths(ways):
    return np.sqrt(np.sum(ways**2, axis=-1))


def _unit_vectors(count):
    """Returns vectors of length 1 that have hardly anything in common."""
    return np.random.default_rng(0).normal(size=[count, 20_000]) / np.sqrt(20_000)


def _inertia(x, v, particles, largest=0.5):
    """Returns w from the particles' own positions, as the definition has it."""
    m = particles.mean(0)
    way = m - x
    with np.errstate(divide="ignore", invalid="ignore"):
        cohesion = len(particles) * way @ way / np.sum((particles - m) ** 2)
        alignment = way @ v / np.sqrt((way @ way) * (v @ v))
        reach = 0.5 * np.sqrt((way @ way) / (v @ v))
    alignment = np.nan_to_num(alignment)
    turn = max(0, min(alignment / 0.6, (0.8 - alignment) / 0.2))
    num = len(particles)
    progress = max(0, ((num - 1) * cohesion - 1) / num)
    w = np.minimum(largest * turn / (1 + progress**2), reach)
    return np.round(1024 * w) / 1024


class CentroidSwarmTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(num_particles=(2, 3, 8), dtype=(np.float32, np.float64))
    def test_flies_like_numpy(self, num_particles, dtype):
        """Against PSO of the centroid written out in NumPy, from all positions."""
        rng = np.random.default_rng(0)
        rule = tf_psops.CentroidSwarm()
        move = _compiled(rule)
        goal = 3 * rng.normal(size=3)
        x, v = np.zeros(3), np.zeros(3)
        state = rule.init(tf.constant(x, dtype))
        inertias = []
        for _ in range(12):
            kicks = rng.normal(size=[num_particles, 3])
            particles = x + 0.3 * (goal - x) + 0.5 * kicks
            mean = particles.mean(0)
            w = _inertia(x, v, particles)
            inertias.append(w)
            news = _news(dtype(mean), _lengths(particles - x))
            x, v = mean + w * v, mean + w * v - x
            state, moved = move(state, tf.constant(particles[0], dtype), news)
            self.assertEqual(moved.dtype, dtype)
            error = 100 * np.finfo(dtype).eps
            self.assertAllClose(moved, x, rtol=error, atol=error)
            self.assertAllClose(state.velocity, v, rtol=error, atol=error)
            self.assertAllEqual(rule.agreed(state, mean), moved)
        self.assertEqual(inertias[0], 0)
        self.assertGreater(len(set(inertias)), 4)

    def _moves_by(self, particles, velocity, distances=None, rule=None):
        """Returns the inertia by which a swarm that went on from 0 moves."""
        rule = rule or tf_psops.CentroidSwarm()
        particles, velocity = np.array(particles, float), np.array(velocity, float)
        healthy = particles[np.isfinite(particles).all(-1)]
        state = rule.init(tf.zeros([3], tf.float64))
        state = state._replace(previous=tf.constant(-velocity))
        if distances is None:
            distances = _lengths(particles)
        news = _news(healthy.mean(0), distances)
        state, moved = _compiled(rule)(state, tf.zeros([3], tf.float64), news)
        self.assertAllEqual(state.velocity, moved)
        self.assertAllEqual(state.position, moved)
        gone = moved - healthy.mean(0)
        w = np.dot(gone, velocity) / np.dot(velocity, velocity)
        self.assertAllClose(gone, w * velocity)
        return w

    def test_falls_as_the_swarm_flies_together(self):
        spread = np.array([[0.0, 1, 0], [0, -1, 0]])
        ws = [
            self._moves_by([[d, 0, 0], [d, 0, 0]] + spread, [0.0006, 0, 0.0008])
            for d in (0.01, 0.5, 1, 2, 10)
        ]
        self.assertAllClose(ws[0], 0.5)
        self.assertAllClose(ws, sorted(ws, reverse=True))
        self.assertLess(ws[-1], 0.001)

    def test_falls_as_the_swarm_turns_or_flies_straight_on(self):
        particles = np.array([[0.1, 1, 0], [0.1, -1, 0]])
        cosines = np.array([0.6, 0.3, 0, -0.5, -1, 0.7, 0.8, 1])
        ws = [
            self._moves_by(particles, [0.01 * cosine, 0, 0.01 * np.sqrt(1 - cosine**2)])
            for cosine in cosines
        ]
        expected = ws[0] * np.array([1, 0.5, 0, 0, 0, 0.5, 0, 0])
        self.assertAllClose(ws, expected, rtol=0, atol=1e-3)

    def test_two_particles_by_hand(self):
        # m = (1, 0, 0): R = 2 * 1 / (1 + 1) = 1, as much as noise alone has.
        w = self._moves_by([[1, 1, 0], [1, -1, 0]], [0.3, 0, 0.4])
        self.assertAllClose(w, 0.5)
        # m = (2, 0, 0): R = 2 * 4 / (1 + 1) = 4, S = (4 - 1) / 2.
        w = self._moves_by([[2, 1, 0], [2, -1, 0]], [0.3, 0, 0.4])
        self.assertAllClose(w, 0.5 / (1 + 1.5**2), atol=1e-3)

    def _factors(self, ways, mean=None):
        """Returns the factors of particles that went on from 0, 60 degrees off v."""
        mean = ways.mean(0) if mean is None else mean
        across = np.roll(mean, 1)
        across -= across @ mean / (mean @ mean) * mean
        velocity = mean / 2 + np.sqrt(0.75) * across * _lengths(mean) / _lengths(across)
        rule = tf_psops.CentroidSwarm()
        state = rule.init(tf.zeros(len(mean), tf.float64))
        state = state._replace(previous=tf.constant(-velocity))
        return _factors(rule, state, _news(mean, _lengths(ways))), velocity

    @parameterized.parameters(2, 4, 32)
    def test_heeds_progress_alike_with_any_number_of_particles(self, num):
        """Particles whose common way is as long as the noise of each."""
        *noise, way = _unit_vectors(num + 1)
        factors, velocity = self._factors(way + noise)
        w = _inertia(np.zeros(len(way)), velocity, way + noise)
        self.assertAllClose(w, 0.25 * 0.5 / 0.6, rtol=0.05)
        self.assertAllClose(factors.inertia, w)

    @parameterized.product(
        dtype=(tf.float16, tf.bfloat16), together=(0.01, 0.3, 1, 3, 100)
    )
    def test_heeds_progress_alike_in_a_short_payload(self, dtype, together):
        """Ways are rounded before they travel, the particles' distances are not."""
        *noise, way = _unit_vectors(4 + 1)
        ways = together * way + noise
        rounded = tf.cast(tf.cast(ways, dtype), tf.float64).numpy()
        whole, _ = self._factors(ways)
        short, _ = self._factors(ways, rounded.mean(0))
        self.assertAllClose(short.inertia, whole.inertia, atol=3 / 1024)
        if together < 100:  # There is no inertia anyway.
            self.assertAllClose(short.cohesion, whole.cohesion, rtol=0.02)

    @parameterized.product(share=(0.35, 0.7, 1), together=(0.3, 1, 3))
    def test_one_that_has_joined_changes_little(self, share, together):
        """It began where all did; fresh momentum takes it 0.35 as far in ten steps."""
        *noise, way = _unit_vectors(8 + 1)
        ways = together * way + noise
        without, _ = self._factors(ways[1:])
        ways[0] *= share
        factors, _ = self._factors(ways)
        self.assertAllClose(factors.inertia, without.inertia, rtol=0.2, atol=0.01)

    def test_goes_on_by_half_of_the_way_at_most(self):
        w = self._moves_by([[1, 1, 0], [1, -1, 0]], [2.4, 0, 3.2])
        self.assertAllClose(w, 0.5 / 4)

    @parameterized.parameters(_INF, _NAN)
    def test_counts_the_particles_in_order(self, out_of_order):
        healthy = [[1, 1, 0], [1, -1, 1], [2, 0, 0]]
        expected = self._moves_by(healthy, [0.3, 0.4, 0])
        self.assertGreater(expected, 0)
        w = self._moves_by([*healthy, [out_of_order] * 3], [0.3, 0.4, 0])
        self.assertAllClose(w, expected, rtol=1e-12)

    def test_averages_where_it_cannot_tell(self):
        alone = self._moves_by([[1, 1, 0]], [0.6, 0, 0.8])
        in_one_place = self._moves_by([[1, 1, 0]] * 3, [0.6, 0, 0.8])
        at_rest = self._moves_by([[0, 0, 0]] * 3, [1, 0, 0])
        # Rounding made the mean lie further off than the particles' own distances.
        rounded = self._moves_by([[1, 0, 0], [1, 0, 1e-9]], [0.6, 0, 0.8], [0.99, 0.99])
        self.assertAllEqual([alone, in_one_place, at_rest, rounded], [0] * 4)

    @parameterized.parameters((500_001, 1e-6), (3_000_001, 0.01))
    def test_adds_long_vectors_up(self, size, tolerance):
        """The longest that are added up whole, and a sample of longer ones."""
        rng = np.random.default_rng(0)
        # As in networks, tensors differ in how far they go.
        scale = np.repeat(rng.uniform(0.1, 3, 300), size // 300 + 1)[:size]
        x, v = scale * rng.normal(size=[2, size]).astype(np.float32)
        particles = x + 0.3 * v + scale * rng.normal(size=[4, size])
        x, v, particles = np.float32(x), np.float32(v), np.float32(particles)
        rule = tf_psops.CentroidSwarm()
        state = rule.init(tf.constant(x))._replace(previous=tf.constant(x - v))
        news = _news(particles.mean(0), _lengths(particles - x))
        factors = _factors(rule, state, news)
        w = factors.inertia
        self.assertEqual(w.dtype, tf.float32)
        self.assertAllClose(w, _inertia(x, v, particles), atol=tolerance)
        self.assertBetween(w, 0.1, 0.4)
        centroid = particles.mean(0)
        spread = np.sqrt(np.mean(_lengths(particles - centroid) ** 2))
        self.assertAllClose(factors.way, _lengths(centroid - x), rtol=tolerance)
        self.assertAllClose(factors.spread, spread, rtol=tolerance)
        self.assertAllClose(factors.cohesion, (factors.way / factors.spread) ** 2)

    def test_no_inertia_is_parameter_averaging(self):
        rule = tf_psops.CentroidSwarm(inertia=0)
        w = self._moves_by([[1, 1, 0], [1, -1, 0]], [0.3, 0, 0.4], rule=rule)
        self.assertEqual(w, 0)

    @parameterized.parameters(-0.1, 1.0, [(0.3, 0.5)], "x", None, True, _NAN)
    def test_refuses(self, inertia):
        with self.assertRaisesRegex(ValueError, "`inertia`.*Received: inertia="):
            tf_psops.CentroidSwarm(inertia)


class PeersTest(tf.test.TestCase, parameterized.TestCase):
    def test_elastic_average_like_numpy(self):
        rule = tf_psops.ElasticAverage(beta=0.8)
        rng = np.random.default_rng(0)
        x, c = rng.normal(size=[4, 3]), np.ones(3)
        states = [rule.init(tf.constant(c))] * 4
        for _ in range(3):
            x = x + rng.normal(size=x.shape)
            mean = x.mean(axis=0)
            moves = [
                rule.move(state, tf.constant(p), _news(mean), _TENSOR_IDS)
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
