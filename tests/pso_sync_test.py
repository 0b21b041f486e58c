"""Tests of when `tf_psops.PSOSync` synchronises, and of what it refuses."""

import time
from unittest import mock

import keras
import numpy as np
import swarms
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops
from tf_psops.sync import reduction, synchronizer


class IntervalTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (1, 1, 3, 1),
        (3, 1, 7, 3),
        (10, 1, 7, 3),
        (3, 3, 6, 2),
        (6, 3, 9, 3),
        (10, 10, 10, 2),
    )
    def test_syncs_at_every_nth_local_step(self, every, per_execution, steps, epochs):
        model = swarms.swarm(steps_per_execution=per_execution)
        sync = tf_psops.PSOSync(every, tf_psops.ParameterAverage())
        before = swarms.Probe(lambda model: swarms.equal(swarms.weights(model)))
        after = swarms.Probe(
            lambda model: (swarms.equal(swarms.weights(model)), sync.num_syncs)
        )
        swarms.fit(model, swarms.data(steps), before, sync, after, epochs=epochs)

        ends = range(per_execution, steps * epochs + 1, per_execution)
        self.assertEqual(before.seen, [False] * len(ends))
        self.assertEqual(
            after.seen, [(step % every == 0, step // every) for step in ends]
        )
        # Training closes with one more, unless its last step had one.
        self.assertEqual(sync.num_syncs, -(-steps * epochs // every))
        self.assertTrue(swarms.equal(swarms.weights(model)))
        self.assertGreater(sync.sync_seconds, 0)

    def test_interval_no_multiple_of_steps_per_execution(self):
        model = swarms.swarm(steps_per_execution=3)
        with self.assertRaisesRegex(
            ValueError, "sync_every=4 is not a multiple of steps_per_execution=3"
        ):
            swarms.fit(model, swarms.data(6), tf_psops.PSOSync(4))

    def test_sync_inside_an_execution(self):
        model = swarms.swarm(steps_per_execution=3)
        with self.assertRaisesRegex(
            ValueError,
            "sync_every=6 cannot be kept with steps_per_execution=3: local step 6 "
            "fell inside an execution that ended at step 7",
        ):
            swarms.fit(model, swarms.data(4), tf_psops.PSOSync(6), epochs=2)

    def test_second_fit_begins_anew(self):
        model = swarms.swarm()
        sync = tf_psops.PSOSync(2)
        swarms.fit(model, swarms.data(5), sync)
        self.assertEqual(sync.num_syncs, 3)
        after = swarms.Probe(lambda _: sync.num_syncs)
        swarms.fit(model, swarms.data(5), sync, after)
        self.assertEqual(after.seen, [0, 1, 1, 2, 2])
        self.assertEqual(sync.num_syncs, 3)
        other = swarms.swarm(3)
        swarms.fit(other, swarms.data(5, 3), sync)
        self.assertEqual(sync.num_syncs, 3)
        self.assertLen(sync.fitness, 3)


class DelayTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters((2,), (1,), (2, 2))
    def test_what_travels_is_applied_later(self, delay, per_execution=1):
        model = swarms.swarm(3, steps_per_execution=per_execution)
        sync = tf_psops.PSOSync(4, tf_psops.ParameterAverage(), delay=delay)

        def look(model):
            return swarms.weights(model), sync.num_syncs

        before, after = swarms.Probe(look), swarms.Probe(look)
        swarms.fit(model, swarms.data(9 + per_execution, 3), before, sync, after)
        start = 0
        for number, ((own, _), (moved, syncs)) in enumerate(
            zip(before.seen, after.seen), 1
        ):
            step = number * per_execution
            if step in (4, 8):
                start = own
            if step in (4 + delay, 8 + delay):
                self.assertAllClose(moved, start.mean(axis=0) + own - start, atol=1e-6)
                self.assertFalse(swarms.equal(moved))
            else:
                self.assertAllEqual(moved, own)
            self.assertEqual(syncs, (step >= 4 + delay) + (step >= 8 + delay))
        self.assertEqual(sync.num_syncs, 3)
        for weights in swarms.weights(model):
            self.assertAllClose(weights, after.seen[-1][0].mean(axis=0), atol=1e-6)

    def test_training_does_not_wait(self):
        travel = reduction.Reduction.travel
        events = []

        def slow(self, *args):
            time.sleep(0.5)
            result = travel(self, *args)
            events.append("there")
            return result

        model = swarms.swarm()
        sync = tf_psops.PSOSync(3, tf_psops.ParticleSwarm(), delay=2)
        probe = swarms.Probe(lambda _: events.append("step"))
        with mock.patch.object(reduction.Reduction, "travel", slow):
            swarms.fit(model, swarms.data(7), sync, probe)
        warmed_up, *rest = events
        self.assertEqual(warmed_up, "there")
        trips = " ".join(rest).split("there")
        self.assertEqual([trip.count("step") for trip in trips], [4, 3, 0, 0])

    def test_ends_and_pauses_under_way(self):
        """Evaluations, an end and new weights while something travels."""

        def fit(*callbacks, steps=6):
            model = swarms.swarm(
                3, make=lambda: swarms.dense(layers.BatchNormalization())
            )
            sync = tf_psops.PSOSync(5, optimizer_slots="average", delay=3)
            swarms.fit(model, swarms.data(steps, 3), *callbacks, sync)
            return model.get_weights(), sync.num_syncs

        class Evaluate(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                self.model.evaluate(swarms.data(1, 3), verbose=0)

        expected, num_syncs = fit()
        self.assertEqual(num_syncs, 2)
        evaluated, _ = fit(Evaluate())
        for one, other in zip(evaluated, expected):
            self.assertAllEqual(one, other)

        class Set(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch == 5:
                    self.model.set_weights([0 * w for w in self.model.get_weights()])

        weights, num_syncs = fit(Set())
        self.assertEqual(num_syncs, 1)
        for value in weights:
            self.assertAllEqual(value, 0 * value)

    def test_sick_particle_takes_nothing_along(self):
        class Break(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch in (1, 4):  # Before a start, and while something travels.
                    kernel = _variables(self.model)[0]
                    kernel.assign(np.nan * kernel)

        def _variables(model):
            variable = model.trainable_variables[0].value
            return model.distribute_strategy.experimental_local_results(variable)

        model = swarms.swarm(3)
        sync = tf_psops.PSOSync(3, tf_psops.ParameterAverage(), delay=2)
        swarms.fit(model, swarms.data(12, 3), Break(), sync)
        self.assertEqual(sync.num_diverged, 2)
        self.assertTrue(np.isfinite(swarms.weights(model)).all())

    @parameterized.parameters(-1, 4, 1.5, None, True)
    def test_refuses(self, delay):
        with self.assertRaisesRegex(ValueError, "`delay`.*below sync_every=4.*delay="):
            tf_psops.PSOSync(4, delay=delay)

    def test_no_multiple_of_steps_per_execution(self):
        model = swarms.swarm(steps_per_execution=2)
        with self.assertRaisesRegex(ValueError, "delay=1 is not a multiple"):
            swarms.fit(model, swarms.data(4), tf_psops.PSOSync(4, delay=1))


class RehearsalTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(tf_psops.CentroidSwarm, tf_psops.ParticleSwarm)
    def test_no_sync_waits_for_a_compiler(self, rule):
        rule = rule()
        functions = ("offer", "factors", "move", "agreed")
        for name in functions:
            setattr(rule, name, mock.Mock(wraps=getattr(rule, name)))

        def traces():
            return sum(getattr(rule, name).call_count for name in functions)

        sync = tf_psops.PSOSync(2, rule)
        seen = []

        class Watch(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                self.model.evaluate(swarms.data(1), verbose=0)
                seen.append((time.perf_counter(), traces(), sync.sync_seconds))

        model = swarms.swarm()
        start = time.perf_counter()
        swarms.fit(model, swarms.data(7), sync, Watch())
        swarms.fit(model, swarms.data(3), sync, Watch())
        ends, traced, seconds = zip(*seen)
        self.assertGreater(traced[0], 0)
        self.assertEqual((set(traced), traces()), ({traced[0]}, traced[0]))
        # Tracing and compiling takes seconds, a synchronisation milliseconds.
        self.assertLess(seconds[1], (ends[0] - start) / 10)

    @parameterized.parameters(tf_psops.CentroidSwarm, tf_psops.ParticleSwarm)
    def test_leaves_nothing_behind(self, rule):
        def fit():
            model = swarms.swarm(
                make=lambda: swarms.dense(layers.BatchNormalization()),
                optimizer=keras.optimizers.Adam,
            )
            sync = tf_psops.PSOSync(2, rule(), optimizer_slots="average")
            after = swarms.Probe(lambda model: (swarms.weights(model), sync.fitness))
            history = swarms.fit(model, swarms.data(5), sync, after)
            return *zip(*after.seen[1:]), history["loss"], model.get_weights()

        warm_up = mock.Mock()
        with mock.patch.object(synchronizer.Synchronizer, "warm_up", warm_up):
            without = fit()
        warm_up.assert_called_once()
        for got, expected in zip(tf.nest.flatten(fit()), tf.nest.flatten(without)):
            self.assertAllEqual(got, expected)


class ArgumentsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ({"sync_every": 0}, "`sync_every`.*at least 1.*sync_every=0"),
        ({"sync_every": 2.0}, "`sync_every`.*sync_every=2.0"),
        ({"sync_every": True}, "`sync_every`.*sync_every=True"),
        ({"sync_every": 1, "rule": "average"}, "`rule`.*tf_psops.Rule.*'average'"),
        ({"sync_every": 1, "non_trainable": "no"}, "`non_trainable`.*local.*'no'"),
        (
            {"sync_every": 1, "payload_dtype": "int8"},
            "`payload_dtype`.*float16.*'int8'",
        ),
        ({"sync_every": 1, "optimizer_slots": 1}, "`optimizer_slots`.*local.*=1"),
    )
    def test_bad_arguments(self, arguments, text):
        with self.assertRaisesRegex(ValueError, text):
            tf_psops.PSOSync(**arguments)

    def test_model_under_another_strategy(self):
        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
        with strategy.scope():
            mirrored = swarms.compiled(swarms.dense())
        for model, name in (
            (swarms.compiled(swarms.dense()), "DefaultDistributionStrategy"),
            (mirrored, "MirroredStrategy"),
        ):
            with self.assertRaisesRegex(
                ValueError, f"under _?{name}.*with strategy.scope"
            ):
                swarms.fit(model, swarms.data(2), tf_psops.PSOSync(1))

    def test_optimizer_made_outside_the_scope(self):
        optimizer = keras.optimizers.SGD(0.1)
        with tf_psops.SwarmStrategy.in_process(2).scope():
            model = swarms.compiled(swarms.dense(), optimizer)
        with self.assertRaisesRegex(ValueError, "SGD, made outside.*strategy.scope"):
            swarms.fit(model, swarms.data(2), tf_psops.PSOSync(1))

    def test_rule_that_returns_another_shape(self):
        class Short(tf_psops.Rule):
            def move(self, state, position, news, tensor_ids):
                return state, position[1:]

        model = swarms.swarm()
        with self.assertRaisesRegex(ValueError, r"Short.*`move`.*\(15,\).*\(14,\)"):
            swarms.fit(model, swarms.data(2), tf_psops.PSOSync(1, Short()))

    def test_rule_with_unknown_exchange(self):
        class Odd(tf_psops.ParameterAverage):
            exchange = "sum"

        with self.assertRaisesRegex(
            ValueError, "`rule.exchange`.*'best' or 'mean'.*'sum'"
        ):
            tf_psops.PSOSync(1, Odd())


if __name__ == "__main__":
    tf.test.main()
