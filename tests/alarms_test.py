"""Tests of the warnings of what goes wrong in a swarm without an error."""

import time

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import tf_psops
from tests import clusters, swarms
from tf_psops.sync import alarms

_ROWS = 16  # Of one particle in one step.


def _batches(steps, particles, noise=()):
    """Returns a dataset of global batches, and of classes that are told by rows.

    Args:
        steps: The number of batches.
        particles: The number of particles.
        noise: For each particle the share of its classes that are random, 0 for those
            that are left out.
    """
    random = np.random.default_rng(0)
    x = random.normal(size=(steps, particles, _ROWS, 4)).astype("float32")
    y = x.argmax(-1) % 3
    for particle, share in enumerate(noise):
        count = round(share * _ROWS)
        y[:, particle, :count] = random.integers(3, size=(steps, count))
    data = tf.data.Dataset.from_tensor_slices((x.reshape(-1, 4), y.reshape(-1)))
    return data.batch(particles * _ROWS)


def _train_beside_a_slow_one(seconds):
    """Trains a worker of a cluster, the second one slowly, and returns warnings."""
    strategy = tf_psops.SwarmStrategy()
    with strategy.scope():
        model = swarms.compiled(swarms.dense())
    sync = tf_psops.PSOSync(1)

    class Slow(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            time.sleep(seconds if strategy.worker_index == 1 else 0)

    swarms.fit(model, swarms.data(30), Slow(), sync)
    checker = alarms.Alarms(1)
    return [text for record in sync.log for text in checker.check(record)]


class TrainingTest(tf.test.TestCase, parameterized.TestCase):
    """What is logged in real trainings, in order and not."""

    def _warnings(self, model, data, sync_every=1):
        sync = tf_psops.PSOSync(sync_every)
        with self.assertLogs("absl", "WARNING") as logs:
            swarms.fit(model, data, sync)
        return logs.output

    def test_same_data(self):
        x, y = swarms.arrays(4, 1)
        x, y = (np.repeat(a.reshape(4, 1, swarms.ROWS, -1), 2, 1) for a in (x, y))
        data = tf.data.Dataset.from_tensor_slices((x.reshape(-1, 4), y.reshape(-1)))
        [text] = self._warnings(swarms.swarm(), data.batch(2 * swarms.ROWS))
        self.assertRegex(text, "collapsed: at synchronisation 0 .* same data")

    def test_learning_rate_too_high(self):
        with tf_psops.SwarmStrategy.in_process(2).scope():
            model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
            # Stable below 2, over the largest eigenvalue of the rows, about 1.
            model.compile(keras.optimizers.SGD(2.0), "mse")
        data = _batches(20, 2).map(lambda x, y: (x, x[:, :1]))
        [text] = self._warnings(model, data)
        self.assertRegex(text, "flies apart.*Lower the learning rate")

    @parameterized.parameters(2, 3)
    def test_one_bad_shard(self, particles):
        noise = [0.0, 1.0, 0.0][:particles]
        data = _batches(60, particles, noise)
        [text] = self._warnings(swarms.swarm(particles), data)
        self.assertRegex(text, "Particle 1 is always last.*Look at its shard")

    def test_unequal_shards(self):
        data = _batches(60, 4, [0.0, 0.3, 0.6, 0.9])
        [text] = self._warnings(swarms.swarm(4), data)
        self.assertRegex(text, "unequal.*of particle 0, to .*, of particle 3.*validat")

    def test_one_particle_out_of_order_again_and_again(self):
        x, y = swarms.arrays(8, 3)
        x.reshape(8, 3, swarms.ROWS, 4)[2:, 2] = np.inf
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(3 * swarms.ROWS)
        texts = self._warnings(swarms.swarm(3), data)
        [text] = [text for text in texts if "at its machine" in text]
        self.assertRegex(text, "Particle 2 was out of order at 5 of the last 7")

    @parameterized.parameters(
        (tf_psops.CentroidSwarm, 2), (tf_psops.ParameterAverage, 4)
    )
    def test_in_order(self, rule, particles):
        model = swarms.swarm(particles)
        with self.assertNoLogs("absl", "WARNING"):
            sync = tf_psops.PSOSync(1, rule())
            swarms.fit(model, _batches(60, particles), sync)
        self.assertLen(sync.log, 60)

    def test_slow_worker(self):
        first, second = clusters.run(_train_beside_a_slow_one, 2, 0.1)
        for texts in first, second:
            [text] = [text for text in texts if "waited for" in text]
            self.assertRegex(text, "Worker 1 is always waited for.*at its machine")


def _record(**more):
    return {
        "sync": 7,
        "seconds": 0.0,
        "fitness": [1.0, 1.1],
        "distances": [1.0, 1.0],
        "diverged": [],
        "waited": [None],
        "waiting_seconds": 0.0,
        "working_seconds": 0.0,
        **more,
    }


class RecordsTest(tf.test.TestCase, parameterized.TestCase):
    """What is said of records that are made up."""

    def _warnings(self, *records):
        checker = alarms.Alarms(10)
        return [text for record in records for text in checker.check(record)]

    @parameterized.parameters(
        {"fitness": [1.0, 1.0 + 1e-4]},
        {"fitness": [1.0, 1.0], "distances": [1.0, 1.001]},
        {"fitness": [1.0, 1.0], "distances": [0.0, 0.0]},  # At rest.
        {"fitness": [1.0, None]},
        {"fitness": [None, None]},
        {"fitness": [1.0], "distances": [1.0]},
    )
    def test_not_collapsed(self, **values):
        self.assertEmpty(self._warnings(_record(**values)))

    def _times(self, waiting, working):
        return [
            _record(seconds=2.0 * i, waiting_seconds=waiting, working_seconds=working)
            for i in range(20)
        ]

    def test_much_time(self):
        [text] = self._warnings(*self._times(0.1, 0.5))
        self.assertRegex(text, "30 % of the time. Synchronise.*sync_every, now 10")
        [text] = self._warnings(*self._times(0.5, 0.1))
        self.assertRegex(text, "30 % of the time. Most of it this worker waits")

    def test_not_much_time(self):
        self.assertEmpty(self._warnings(*self._times(0.1, 0.2)))
        self.assertEmpty(self._warnings(*self._times(0.0, 1.9)[:5]))
        compiled = _record(seconds=1.0, working_seconds=100.0)
        self.assertEmpty(self._warnings(compiled, *self._times(0.1, 0.2)[1:]))

    def _flights(self, ways, losses):
        return [
            _record(fitness=[loss, loss + 0.1], distances=[way, 1.1 * way])
            for way, loss in zip(ways, losses)
        ]

    def test_flies_apart(self):
        [text] = self._warnings(
            *self._flights(2.0 ** np.arange(9), [1.0] * 5 + [9] * 4)
        )
        self.assertRegex(text, "flies apart: .*16 times .* 9.05, above 1.05")

    def test_flies_well(self):
        rising = np.linspace(0.01, 1, 40)
        for ways, losses in (
            (rising, np.linspace(3, 0.1, 40)),  # The learning rate rises.
            (np.tile(rising, 2), [2.0] * 10 + [0.01, 0.1] * 35),  # And anew.
            ([1.0] * 40, [1.0] * 20 + [5.0] * 20),  # Another task.
            (rising, [-5.0] * 20 + [-6.0] * 20),
        ):
            self.assertEmpty(self._warnings(*self._flights(ways, losses)))

    def _losses(self, means, noise, count=40):
        random = np.random.default_rng(0)
        means = np.broadcast_to(means, [count, len(means)])
        return [
            _record(fitness=row.tolist(), distances=[1.0] * len(row))
            for row in means + noise * random.normal(size=means.shape)
        ]

    def test_unlike(self):
        [text] = self._warnings(*self._losses([1, 1, 2], 0.1))
        self.assertRegex(text, "Particle 2 is always last: its loss was 2")
        [text] = self._warnings(*self._losses([1, 2, 3], 0.1))
        self.assertRegex(
            text, "unequal.*from 1.*, of particle 0, to 3.*, of particle 2"
        )
        [text] = self._warnings(*self._losses([0.2, 1, 1], 0.1))
        self.assertRegex(text, "unequal.*from 0.*, of particle 0")

    def test_alike(self):
        for records in (
            self._losses([1, 1, 2], 3.0),  # By chance.
            self._losses([1, 1, 1.1], 0.01),  # A little.
            self._losses([1, 2], 0.1, count=19),  # Not for long.
            self._losses([1], 0.1),
            # Learnt by heart.
            [*self._losses([3, 3], 0.5, 5), *self._losses([0.01, 0.1], 0.01)],
        ):
            self.assertEmpty(self._warnings(*records))

    def test_worker_that_was_away_is_not_judged(self):
        records = self._losses([1, 1, 2], 0.1)
        for record in records[::10]:
            record["fitness"][2] = None
        self.assertEmpty(self._warnings(*records))

    def _waits(self, waits, count=30):
        random = np.random.default_rng(0)
        return [
            _record(
                seconds=1.0 * i,
                waited=[w if w is None else w + 0.01 * random.random() for w in waits],
            )
            for i in range(count)
        ]

    def test_waited_for(self):
        [text] = self._warnings(*self._waits([0.3, 0.0, 0.25, None]))
        self.assertRegex(text, "Worker 1 .* last to 20 of the last 20 .* lost 2[78] %")

    def test_not_waited_for(self):
        for records in (
            self._waits([0.05, 0.0]),
            self._waits([0.3, 0.3]),
            self._waits([None]),
            self._waits([0.3, 0.0], count=20),
        ):
            self.assertEmpty(self._warnings(*records))


if __name__ == "__main__":
    tf.test.main()
