"""Tests of `tf_psops.PSOSync` with particles in one process."""

import time
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops
from tf_psops import exchange, synchronizer

_ROWS = 2  # Of one particle in one step.


def _dense(*more):
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input([4]), *more, layers.Dense(3)])


def _compile(model, optimizer=None, **kwargs):
    model.compile(
        optimizer=optimizer or keras.optimizers.SGD(0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **kwargs,
    )
    return model


def _swarm(particles=2, make=_dense, optimizer=keras.optimizers.SGD, **kwargs):
    strategy = tf_psops.SwarmStrategy.in_process(particles)
    with strategy.scope():
        model = _compile(make(), optimizer(0.1), **kwargs)
    return strategy, model


def _arrays(steps, particles=2):
    random = np.random.default_rng(0)
    x = random.normal(size=(steps * particles * _ROWS, 4)).astype("float32")
    return x, x.argmax(-1) % 3


def _data(steps, particles=2):
    dataset = tf.data.Dataset.from_tensor_slices(_arrays(steps, particles))
    return dataset.batch(particles * _ROWS)


def _local(model, variable):
    copies = model.distribute_strategy.experimental_local_results(variable.value)
    return [v.numpy() for v in copies]


def _weights(model):
    """Returns the replicas' trainable weights, [W, P]."""
    copies = zip(*(_local(model, v) for v in model.trainable_variables))
    return np.stack([np.concatenate([w.ravel() for w in c]) for c in copies])


def _equal(replicas):
    return all(np.array_equal(replicas[0], other) for other in replicas[1:])


def _fit(model, data, *callbacks, **kwargs):
    return model.fit(data, callbacks=list(callbacks), verbose=0, **kwargs).history


class _Probe(keras.callbacks.Callback):
    """Notes (value of `look(model)`) at the end of every execution."""

    def __init__(self, look):
        super().__init__()
        self._look = look
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self._look(self.model))


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
        _, model = _swarm(steps_per_execution=per_execution)
        sync = tf_psops.PSOSync(every, tf_psops.ParameterAverage())
        before = _Probe(lambda model: _equal(_weights(model)))
        after = _Probe(lambda model: (_equal(_weights(model)), sync.num_syncs))
        _fit(model, _data(steps), before, sync, after, epochs=epochs)

        ends = range(per_execution, steps * epochs + 1, per_execution)
        self.assertEqual(before.seen, [False] * len(ends))
        self.assertEqual(
            after.seen, [(step % every == 0, step // every) for step in ends]
        )
        # Training closes with one more, unless its last step had one.
        self.assertEqual(sync.num_syncs, -(-steps * epochs // every))
        self.assertTrue(_equal(_weights(model)))
        self.assertGreater(sync.sync_seconds, 0)

    def test_interval_no_multiple_of_steps_per_execution(self):
        _, model = _swarm(steps_per_execution=3)
        with self.assertRaisesRegex(
            ValueError, "sync_every=4 is not a multiple of steps_per_execution=3"
        ):
            _fit(model, _data(6), tf_psops.PSOSync(4))

    def test_sync_inside_an_execution(self):
        _, model = _swarm(steps_per_execution=3)
        with self.assertRaisesRegex(
            ValueError,
            "sync_every=6 cannot be kept with steps_per_execution=3: local step 6 "
            "fell inside an execution that ended at step 7",
        ):
            _fit(model, _data(4), tf_psops.PSOSync(6), epochs=2)

    def test_second_fit_begins_anew(self):
        _, model = _swarm()
        sync = tf_psops.PSOSync(2)
        _fit(model, _data(5), sync)
        self.assertEqual(sync.num_syncs, 3)
        after = _Probe(lambda _: sync.num_syncs)
        _fit(model, _data(5), sync, after)
        self.assertEqual(after.seen, [0, 1, 1, 2, 2])
        self.assertEqual(sync.num_syncs, 3)
        _, other = _swarm(3)
        _fit(other, _data(5, 3), sync)
        self.assertEqual(sync.num_syncs, 3)
        self.assertLen(sync.fitness, 3)


class DelayTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters((2,), (1,), (2, 2))
    def test_what_travels_is_applied_later(self, delay, per_execution=1):
        _, model = _swarm(3, steps_per_execution=per_execution)
        sync = tf_psops.PSOSync(4, tf_psops.ParameterAverage(), delay=delay)

        def look(model):
            return _weights(model), sync.num_syncs

        before, after = _Probe(look), _Probe(look)
        _fit(model, _data(9 + per_execution, 3), before, sync, after)
        start = 0
        for number, ((own, _), (moved, syncs)) in enumerate(
            zip(before.seen, after.seen), 1
        ):
            step = number * per_execution
            if step in (4, 8):
                start = own
            if step in (4 + delay, 8 + delay):
                self.assertAllClose(moved, start.mean(axis=0) + own - start, atol=1e-6)
                self.assertFalse(_equal(moved))
            else:
                self.assertAllEqual(moved, own)
            self.assertEqual(syncs, (step >= 4 + delay) + (step >= 8 + delay))
        self.assertEqual(sync.num_syncs, 3)
        for weights in _weights(model):
            self.assertAllClose(weights, after.seen[-1][0].mean(axis=0), atol=1e-6)

    def test_training_does_not_wait(self):
        travel = exchange.Exchange.travel
        events = []

        def slow(self, *args):
            time.sleep(0.5)
            result = travel(self, *args)
            events.append("there")
            return result

        _, model = _swarm()
        sync = tf_psops.PSOSync(3, tf_psops.ParticleSwarm(), delay=2)
        probe = _Probe(lambda _: events.append("step"))
        with mock.patch.object(exchange.Exchange, "travel", slow):
            _fit(model, _data(7), sync, probe)
        rehearsed, *rest = events
        self.assertEqual(rehearsed, "there")
        trips = " ".join(rest).split("there")
        self.assertEqual([trip.count("step") for trip in trips], [4, 3, 0, 0])

    def test_ends_and_pauses_under_way(self):
        """Evaluations, an end and new weights while something travels."""

        def fit(*callbacks, steps=6):
            _, model = _swarm(3, make=lambda: _dense(layers.BatchNormalization()))
            sync = tf_psops.PSOSync(5, optimizer_slots="average", delay=3)
            _fit(model, _data(steps, 3), *callbacks, sync)
            return model.get_weights(), sync.num_syncs

        class Evaluate(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                self.model.evaluate(_data(1, 3), verbose=0)

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

        _, model = _swarm(3)
        sync = tf_psops.PSOSync(3, tf_psops.ParameterAverage(), delay=2)
        _fit(model, _data(12, 3), Break(), sync)
        self.assertEqual(sync.num_sick, 2)
        self.assertTrue(np.isfinite(_weights(model)).all())

    @parameterized.parameters(-1, 4, 1.5, None, True)
    def test_refuses(self, delay):
        with self.assertRaisesRegex(ValueError, "`delay`.*below sync_every=4.*delay="):
            tf_psops.PSOSync(4, delay=delay)

    def test_no_multiple_of_steps_per_execution(self):
        _, model = _swarm(steps_per_execution=2)
        with self.assertRaisesRegex(ValueError, "delay=1 is not a multiple"):
            _fit(model, _data(4), tf_psops.PSOSync(4, delay=1))


class RehearsalTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(tf_psops.CentroidSwarm, tf_psops.ParticleSwarm)
    def test_no_sync_waits_for_a_compiler(self, rule):
        rule = rule()
        functions = ("offer", "factors", "trial", "move", "agreed")
        for name in functions:
            setattr(rule, name, mock.Mock(wraps=getattr(rule, name)))

        def traces():
            return sum(getattr(rule, name).call_count for name in functions)

        sync = tf_psops.PSOSync(2, rule)
        seen = []

        class Watch(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                self.model.evaluate(_data(1), verbose=0)
                seen.append((time.perf_counter(), traces(), sync.sync_seconds))

        _, model = _swarm()
        start = time.perf_counter()
        _fit(model, _data(7), sync, Watch())
        _fit(model, _data(3), sync, Watch())
        ends, traced, seconds = zip(*seen)
        self.assertGreater(traced[0], 0)
        self.assertEqual((set(traced), traces()), ({traced[0]}, traced[0]))
        # Tracing and compiling takes seconds, a synchronisation milliseconds.
        self.assertLess(seconds[1], (ends[0] - start) / 10)

    @parameterized.parameters(tf_psops.CentroidSwarm, tf_psops.ParticleSwarm)
    def test_leaves_nothing_behind(self, rule):
        def fit():
            _, model = _swarm(
                make=lambda: _dense(layers.BatchNormalization()),
                optimizer=keras.optimizers.Adam,
            )
            sync = tf_psops.PSOSync(2, rule(), optimizer_slots="average")
            after = _Probe(lambda model: (_weights(model), sync.fitness))
            history = _fit(model, _data(5), sync, after)
            return *zip(*after.seen[1:]), history["loss"], model.get_weights()

        rehearse = mock.Mock()
        with mock.patch.object(synchronizer.Synchronizer, "rehearse", rehearse):
            without = fit()
        rehearse.assert_called_once()
        for got, expected in zip(tf.nest.flatten(fit()), tf.nest.flatten(without)):
            self.assertAllEqual(got, expected)


class FitnessTest(tf.test.TestCase):
    def test_fitness_is_each_particles_mean_loss_since_the_last_sync(self):
        particles, steps, every = 3, 5, 4
        _, model = _swarm(particles)
        rule = tf_psops.ParticleSwarm(inertia=0, cognitive=0, social=0)  # Stays.
        sync = tf_psops.PSOSync(every, rule)
        after = _Probe(lambda _: sync.fitness)
        _fit(
            model,
            _data(steps, particles),
            sync,
            after,
            epochs=2,
            validation_data=_data(2, particles),
        )
        x, y = (
            a.reshape(steps, particles, _ROWS, *a.shape[1:])
            for a in _arrays(steps, particles)
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        losses = []
        for particle in range(particles):
            alone = _compile(_dense())
            losses.append([])
            for step in [*range(steps)] * 2:
                batch = x[step, particle], y[step, particle]
                losses[-1].append(loss(batch[1], alone(batch[0])))
                alone.train_on_batch(*batch)
        losses = np.array(losses)
        self.assertAllClose(after.seen[3], losses[:, :4].mean(1), rtol=1e-5)
        self.assertAllClose(after.seen[7], losses[:, 4:8].mean(1), rtol=1e-5)
        self.assertAllClose(sync.fitness, losses[:, 8:].mean(1), rtol=1e-5)


class TrajectoryTest(tf.test.TestCase, parameterized.TestCase):
    def test_averaging_every_step_is_synchronous_sgd(self):
        _, model = _swarm(3)
        sync = tf_psops.PSOSync(1, tf_psops.ParameterAverage())
        swarm = _Probe(lambda model: _weights(model)[2])
        _fit(model, _data(6, 3), sync, swarm)
        alone = _compile(_dense())
        plain = _Probe(
            lambda model: np.concatenate([w.ravel() for w in model.get_weights()])
        )
        _fit(alone, _data(6, 3), plain)
        self.assertAllClose(swarm.seen, plain.seen, rtol=0, atol=1e-6)

    @parameterized.parameters("own", "global_best")
    def test_particle_swarm_moves_as_its_formula_says(self, take):
        particles, every, steps = 3, 2, 8
        _, model = _swarm(particles)
        rule = tf_psops.ParticleSwarm(0.4, 0.7, 0.6, take=take, seed=3)
        sync = tf_psops.PSOSync(every, rule)
        start = _weights(model)
        before = _Probe(lambda model: _weights(model).astype("float64"))
        after = _Probe(lambda model: (_weights(model), sync.fitness))
        _fit(model, _data(steps, particles), before, sync, after)

        sizes = [int(np.prod(v.shape)) for v in model.trainable_variables]
        velocity = np.zeros(start.shape)
        best, best_fitness = start.astype("float64"), np.full(particles, np.inf)
        for number, step in enumerate(range(every - 1, steps, every)):
            x, (moved, fitness) = before.seen[step], after.seen[step]
            better = fitness < best_fitness
            best[better], best_fitness[better] = x[better], fitness[better]
            leader = best[best_fitness.argmin()].copy()
            for i in range(particles):
                news = tf_psops.News(None, None, tf.constant(i), tf.constant(number))
                r1, r2 = np.repeat(rule.factors(news, len(sizes)), sizes, axis=1)
                velocity[i] = (
                    0.4 * velocity[i]
                    + 0.7 * r1 * (best[i] - x[i])
                    + 0.6 * r2 * (leader - x[i])
                )
                expected = leader if take == "global_best" else x[i] + velocity[i]
                self.assertAllClose(moved[i], expected, rtol=0, atol=1e-6)
        self.assertNotAllClose(velocity, np.zeros(start.shape), atol=1e-3)
        for weights in _weights(model):  # Training ends with the global best.
            self.assertAllClose(weights, leader, rtol=0, atol=1e-6)


class WeightAverageTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(6, 100)
    def test_training_ends_with_the_mean_of_the_moving_averages(self, every):
        """Keras puts each particle's in place before it tells that training ends."""
        steps, particles = 6, 2
        ema = {"use_ema": True, "ema_momentum": 0.5}
        _, model = _swarm(
            particles, optimizer=lambda rate: keras.optimizers.SGD(rate, **ema)
        )
        _fit(model, _data(steps), tf_psops.PSOSync(every, tf_psops.ParameterAverage()))

        x, y = (a.reshape(steps, particles, _ROWS, -1) for a in _arrays(steps))
        alone = []
        for i in range(particles):
            plain = _compile(_dense(), keras.optimizers.SGD(0.1, **ema))
            data = tf.data.Dataset.from_tensor_slices((x[:, i], y[:, i]))
            plain.fit(data, verbose=0)
            alone.append(np.concatenate([w.ravel() for w in plain.get_weights()]))
        self.assertNotAllClose(alone[0], alone[1], atol=1e-3)
        for weights in _weights(model):
            self.assertAllClose(weights, np.mean(alone, axis=0), rtol=0, atol=1e-6)


class OtherStateTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters("average", "local")
    def test_moving_statistics(self, policy):
        _, model = _swarm(make=lambda: _dense(layers.BatchNormalization()))
        rule = tf_psops.ParameterAverage()
        sync = tf_psops.PSOSync(2, rule, non_trainable=policy)
        mean = model.non_trainable_variables[0]
        before = _Probe(lambda model: np.stack(_local(model, mean)))
        after = _Probe(lambda model: np.stack(_local(model, mean)))
        _fit(model, _data(3), before, sync, after)
        self.assertFalse(_equal(before.seen[1]))
        if policy == "average":
            for copy in after.seen[1]:
                self.assertAllClose(copy, before.seen[1].mean(0))
        else:
            self.assertAllEqual(after.seen[1], before.seen[1])
        for copy in _local(model, mean):  # Training closes on the average.
            self.assertAllClose(copy, after.seen[2].mean(0))

    @parameterized.parameters("average", "local")
    def test_optimizer_slots(self, policy):
        _, model = _swarm(optimizer=keras.optimizers.Adam)
        rule = tf_psops.ParameterAverage()
        sync = tf_psops.PSOSync(2, rule, optimizer_slots=policy)

        def look(model):
            slots = [v for v in model.optimizer.variables if v.shape == (4, 3)]
            self.assertLen(slots, 2)
            return np.stack([_local(model, slot) for slot in slots], axis=1)

        before, after = _Probe(look), _Probe(look)
        _fit(model, _data(2), before, sync, after)
        self.assertFalse(_equal(before.seen[1]))
        if policy == "average":
            for copy in after.seen[1]:
                self.assertAllClose(copy, before.seen[1].mean(0))
        else:
            self.assertAllEqual(after.seen[1], before.seen[1])

    def test_frozen_layers_stay_and_do_not_travel(self):
        def make():
            frozen = layers.Dense(4, trainable=False)
            return _dense(frozen, layers.BatchNormalization(trainable=False))

        _, model = _swarm(make=make)
        start = [v.numpy() for v in model.non_trainable_variables]
        self.assertLen(start, 6)
        seen = set()

        class Spy(tf_psops.ParameterAverage):
            def move(self, state, position, news, tensor_ids):
                seen.add((position.shape[0], tensor_ids.shape[0]))
                return super().move(state, position, news, tensor_ids)

        _fit(model, _data(3), tf_psops.PSOSync(2, Spy()))
        self.assertEqual(seen, {(15, 15)})
        for before, variable in zip(start, model.non_trainable_variables):
            for copy in _local(model, variable):
                self.assertAllEqual(before, copy)


class PayloadTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (tf_psops.CentroidSwarm, "float16"), (tf_psops.ParticleSwarm, "bfloat16")
    )
    def test_weights_travel_rounded(self, rule, payload):
        def fit(**kwargs):
            _, model = _swarm(make=lambda: _dense(layers.BatchNormalization()))
            sync = tf_psops.PSOSync(2, rule(), **kwargs)
            _fit(model, _data(6), sync)
            weights = _weights(model)
            self.assertTrue(_equal(weights))
            return weights[0], sync

        (exact, plain), (rounded, sync) = fit(), fit(payload_dtype=payload)
        self.assertNotAllEqual(rounded, exact)
        self.assertAllClose(rounded, exact, rtol=0, atol=5e-3)
        if rule.exchange == "mean":
            self.assertEqual(
                plain.bytes_moved - sync.bytes_moved, sync.num_syncs * exact.size * 2
            )


class SickParticleTest(tf.test.TestCase, parameterized.TestCase):
    def _poison(self, model, replicas, at_step, value=np.nan):
        kernel = model.trainable_variables[0].value
        copies = model.distribute_strategy.experimental_local_results(kernel)

        def poison(model):
            if len(probe.seen) + 1 == at_step:
                for replica in replicas:
                    copies[replica].assign(copies[replica] * value)

        probe = _Probe(poison)
        return probe

    @parameterized.parameters(
        tf_psops.CentroidSwarm(),
        tf_psops.ParameterAverage(),
        tf_psops.ParticleSwarm(),
        tf_psops.ParticleSwarm(take="global_best"),
    )
    def test_others_do_not_catch_it_and_it_is_put_back(self, rule):
        _, model = _swarm(3)
        sync = tf_psops.PSOSync(2, rule)
        before = _Probe(_weights)
        after = _Probe(lambda model: (_weights(model), sync.fitness))
        values = {1: np.nan, 5: np.inf, 9: 1e5}
        poisons = [self._poison(model, [0], *item) for item in values.items()]
        with self.assertLogs(level="WARNING") as logs:
            _fit(model, _data(12, 3), *poisons, before, sync, after)
        warning = "Particles [0] were out of order"
        self.assertEqual("".join(logs.output).count(warning), 3)
        self.assertEqual(sync.num_sick, 3)
        for step in values:
            weights, fitness = after.seen[step]
            self.assertAllInRange(weights, -10, 10)
            self.assertAllEqual(np.isfinite(fitness), [False, True, True])
            # The default rule adds a velocity later.
            if rule.exchange == "mean" and (step == 1 or rule.num_trials == 0):
                self.assertAllClose(weights[1], before.seen[step][1:].mean(0))
            weights, fitness = after.seen[step + 2]
            self.assertTrue(np.isfinite(fitness).all(), fitness)
            self.assertAllInRange(weights, -10, 10)

    @parameterized.parameters(
        (lambda rate: keras.optimizers.SGD(rate, momentum=0.9), 0.0),
        (keras.optimizers.Adam, 0.0),
        (keras.optimizers.Adagrad, 0.1),
    )
    def test_its_optimizer_slots_are_fresh(self, optimizer, fresh):
        _, model = _swarm(3, optimizer=optimizer)

        def slots(model):
            slot = next(
                v for v in model.optimizer.variables if v.shape == (4, 3)
            )  # That of the kernel.
            return np.stack(_local(model, slot))

        sync = tf_psops.PSOSync(2, tf_psops.ParameterAverage())
        after = _Probe(slots)
        _fit(model, _data(4, 3), self._poison(model, [1], 1), sync, after)
        self.assertAllEqual(after.seen[1][1], np.full([4, 3], np.float32(fresh)))
        for other in (0, 2):
            self.assertNotAllClose(after.seen[1][other], np.full([4, 3], fresh))
        self.assertTrue(np.isfinite(slots(model)).all())

    def test_nobody_in_good_health(self):
        _, model = _swarm()
        with self.assertRaisesRegex(
            FloatingPointError, "No particle.*synchronisation 1.*inf.*learning rate"
        ):
            poison = self._poison(model, [0, 1], 3)
            _fit(model, _data(6), poison, tf_psops.PSOSync(2))


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
            mirrored = _compile(_dense())
        for model, name in (
            (_compile(_dense()), "DefaultDistributionStrategy"),
            (mirrored, "MirroredStrategy"),
        ):
            with self.assertRaisesRegex(
                ValueError, f"under _?{name}.*with strategy.scope"
            ):
                _fit(model, _data(2), tf_psops.PSOSync(1))

    def test_optimizer_made_outside_the_scope(self):
        optimizer = keras.optimizers.SGD(0.1)
        with tf_psops.SwarmStrategy.in_process(2).scope():
            model = _compile(_dense(), optimizer)
        with self.assertRaisesRegex(ValueError, "SGD, made outside.*strategy.scope"):
            _fit(model, _data(2), tf_psops.PSOSync(1))

    def test_rule_that_returns_another_shape(self):
        class Short(tf_psops.Rule):
            def move(self, state, position, news, tensor_ids):
                return state, position[1:]

        _, model = _swarm()
        with self.assertRaisesRegex(ValueError, r"Short.*`move`.*\(15,\).*\(14,\)"):
            _fit(model, _data(2), tf_psops.PSOSync(1, Short()))

    def test_rule_with_unknown_exchange(self):
        class Odd(tf_psops.ParameterAverage):
            exchange = "sum"

        with self.assertRaisesRegex(
            ValueError, "`rule.exchange`.*'best' or 'mean'.*'sum'"
        ):
            tf_psops.PSOSync(1, Odd())


if __name__ == "__main__":
    tf.test.main()
