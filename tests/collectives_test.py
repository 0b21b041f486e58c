"""Tests of `tf_psops.transport.collectives`, in one process and over three."""

import clusters
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import tf_psops
from tf_psops.transport import collectives as collectives_lib

# The last one fills several buckets, the last of them in part.
_SIZES = (1, 10, 3_000_000)
# Each with the largest relative error of rounding to it.
_PAYLOADS = {tf.float16: 2**-11, tf.bfloat16: 2**-8}


def _collectives(strategy):
    return collectives_lib.Collectives(strategy.extended.worker_devices, strategy.peers)


def _vector(particle, size, round_number=0):
    """Returns what a particle brings; differs in every element and every round."""
    return np.arange(size, dtype="float32") % 1000 + 10_000 * particle + round_number


def _gather(strategy, width=3):
    collectives = _collectives(strategy)
    first = collectives.first_particle

    @tf.function
    def gather(start):
        rows = [
            tf.cast(tf.range(width), tf.float64) + 100.0 * (first + i) + start
            for i in range(len(strategy.extended.worker_devices))
        ]
        return collectives.gather(rows)

    return [gather(tf.constant(start, tf.float64)).numpy() for start in (0.0, 0.25)]


def _gathered(particles, width=3):
    table = 100.0 * np.arange(particles)[:, np.newaxis] + np.arange(width)
    return [table, table + 0.25]


def _mean(strategy, size, sick):
    """Returns the mean, on each local device, of all but the particle `sick`."""
    collectives = _collectives(strategy)
    local = len(strategy.extended.worker_devices)
    particles = range(collectives.first_particle, collectives.first_particle + local)
    vectors = [_vector(p, size) * (np.nan if p == sick else 1) for p in particles]
    healthy = np.arange(collectives.num_particles) != sick

    @tf.function
    def mean(vectors, healthy):
        return collectives.mean(vectors, healthy)

    return [v.numpy() for v in mean(vectors, tf.constant(healthy))]


def _broadcast(strategy, size, rounds):
    """Returns, for each (root, round number), whether all local copies are right."""
    collectives = _collectives(strategy)
    local = len(strategy.extended.worker_devices)
    particles = range(collectives.first_particle, collectives.first_particle + local)

    @tf.function
    def broadcast(vectors, root):
        return collectives.broadcast(vectors, root)

    right = []
    for number, root in enumerate(rounds):
        vectors = [tf.constant(_vector(p, size, number)) for p in particles]
        got = broadcast(vectors, tf.constant(root))
        expected = _vector(root, size, number)
        right.append(
            len(got) == local and all(np.array_equal(v, expected) for v in got)
        )
    return right


def _rounded(strategy, payload):
    """Returns the mean, and what the last particle broadcasts, on each local device."""
    collectives = _collectives(strategy)
    local = len(strategy.extended.worker_devices)
    particles = range(collectives.first_particle, collectives.first_particle + local)
    vectors = [tf.saturate_cast(_fractions(p), payload) for p in particles]

    @tf.function
    def exchange(vectors, root):
        healthy = tf.fill([collectives.num_particles], True)
        return (
            collectives.mean(vectors, healthy),
            collectives.broadcast(vectors, root),
        )

    last = tf.constant(collectives.num_particles - 1)
    return [[v.numpy() for v in copies] for copies in exchange(vectors, last)]


def _fractions(particle):
    random = np.random.default_rng(particle).normal(size=20_000).astype("float32")
    random[0] = 1e6  # Too large for float16.
    return random


def _initial_values(strategy):
    """Returns all local copies of variables that each worker fills with its number."""
    mine = tf.fill([2, 3], strategy.worker_index)
    values = [tf.cast(mine, dtype) for dtype in (tf.float32, tf.float16, tf.int64)]
    with strategy.scope():
        variables = [
            tf.Variable(value)
            for value in [*values, mine == 0, mine[0, 0], tf.cast(mine[:0], tf.float32)]
        ]
    local = strategy.experimental_local_results
    return [[copy.numpy() for copy in local(variable)] for variable in variables]


def _strategy_gather(strategy):
    """Returns the numbers of all replicas, as TensorFlow's API gathers them."""
    numbers = strategy.run(
        lambda: tf.reshape(
            tf.distribute.get_replica_context().replica_id_in_sync_group, [1]
        )
    )
    return strategy.gather(numbers, axis=0).numpy()


def _work(local_devices):
    """Is what each worker of a cluster does in the tests below."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * local_devices
    )
    strategy = tf_psops.SwarmStrategy([f"CPU:{i}" for i in range(local_devices)])
    particles = strategy.num_replicas_in_sync
    rounds = [*range(particles), *reversed(range(particles)), 0, 0]
    return {
        "initial values": _initial_values(strategy),
        "gather": _gather(strategy),
        "strategy.gather": _strategy_gather(strategy),
        "mean": [
            [v[[0, -1]] for v in _mean(strategy, size, sick)]
            for size in _SIZES
            for sick in (None, 0, particles - 1)
        ],
        "broadcast": [_broadcast(strategy, size, rounds) for size in _SIZES],
        "rounded": [_rounded(strategy, payload) for payload in _PAYLOADS],
    }


def _expected_mean(particles, size, sick):
    vectors = [_vector(p, size) for p in range(particles) if p != sick]
    return np.mean(vectors, axis=0)


class _RoundedTestCase(tf.test.TestCase):
    def check_rounded(self, copies, payload, particles):
        """Checks the error of what came through; all copies must be equal."""
        bound = _PAYLOADS[payload]
        vectors = np.stack([_fractions(p) for p in range(particles)])
        largest = payload.max if payload == tf.float16 else 1e6
        for got, exact, scale in (
            # Each share is rounded, and each sum of them.
            (copies[0], vectors.mean(0), 2 * np.abs(vectors).sum(0)),
            (copies[1], vectors[-1], np.abs(vectors[-1])),
        ):
            for copy in got:
                self.assertAllEqual(copy, got[0])
                error = np.abs(copy - exact)[1:]
                # Below 2**-14, float16 has a constant error.
                self.assertAllLessEqual(error - bound * scale[1:], 2**-24)
                self.assertGreater(error.max(), 0)
                self.assertTrue(np.isfinite(copy[0]))
                self.assertAllClose(copy[0], largest, rtol=0.05)


class InProcessTest(_RoundedTestCase, parameterized.TestCase):
    @parameterized.parameters(*_PAYLOADS)
    def test_rounds_what_would_travel(self, payload):
        strategy = tf_psops.SwarmStrategy.in_process(3)
        self.check_rounded(_rounded(strategy, payload), payload, 3)

    def test_gather_keeps_the_order_of_the_particles(self):
        strategy = tf_psops.SwarmStrategy.in_process(3)
        for got, expected in zip(_gather(strategy), _gathered(3)):
            self.assertAllEqual(got, expected)

    @parameterized.product(size=_SIZES, sick=(None, 0, 2))
    def test_mean_leaves_out_what_is_not_healthy(self, size, sick):
        strategy = tf_psops.SwarmStrategy.in_process(3)
        copies = _mean(strategy, size, sick)
        self.assertLen(copies, 3)
        for copy in copies:
            self.assertAllClose(copy, _expected_mean(3, size, sick))

    def test_mean_of_two_is_exact(self):
        strategy = tf_psops.SwarmStrategy.in_process(2)
        expected = (_vector(0, 10) + _vector(1, 10)) / np.float32(2)
        self.assertAllEqual(_mean(strategy, 10, None)[1], expected)

    @parameterized.parameters(*_SIZES)
    def test_broadcast_from_every_root(self, size):
        strategy = tf_psops.SwarmStrategy.in_process(3)
        self.assertAllEqual(_broadcast(strategy, size, [0, 1, 2, 1, 0]), [True] * 5)

    def test_strategies_of_different_sizes_live_side_by_side(self):
        for particles in (2, 3, 2):
            strategy = tf_psops.SwarmStrategy.in_process(particles)
            one_each = strategy.run(lambda: tf.constant(1.0))
            self.assertEqual(strategy.reduce("SUM", one_each, axis=None), particles)


class ClusterTest(_RoundedTestCase, parameterized.TestCase):
    @parameterized.parameters((3, 1), (2, 2))
    def test_all_workers_get_the_same(self, workers, local):
        particles = workers * local
        cases = [(size, sick) for size in _SIZES for sick in (None, 0, particles - 1)]
        for result in clusters.run(_work, workers, local):
            shapes = [(2, 3)] * 4 + [(), (0, 3)]
            for copies, shape in zip(result["initial values"], shapes, strict=True):
                for got in copies:  # The chief's: the number 0, and so `mine == 0`.
                    self.assertAllEqual(got, np.full(shape, got.dtype == bool))
            self.assertAllEqual(result["strategy.gather"], np.arange(particles))
            for got, expected in zip(result["gather"], _gathered(particles)):
                self.assertAllEqual(got, expected)
            for copies, (size, sick) in zip(result["mean"], cases):
                self.assertLen(copies, local)
                for ends in copies:
                    expected = _expected_mean(particles, size, sick)[[0, -1]]
                    self.assertAllClose(ends, expected)
            for rounds in result["broadcast"]:
                self.assertAllEqual(rounds, [True] * (2 * particles + 2))
            for copies, payload in zip(result["rounded"], _PAYLOADS):
                self.check_rounded(copies, payload, particles)


if __name__ == "__main__":
    tf.test.main()
