"""Tests of what a synchronisation by `tf_psops.PSOSync` does to the particles."""

import keras
import numpy as np
import swarms
import tensorflow as tf
from absl.testing import parameterized
from keras import layers

import tf_psops


class FitnessTest(tf.test.TestCase):
    def test_fitness_is_each_particles_mean_loss_since_the_last_sync(self):
        particles, steps, every = 3, 5, 4
        model = swarms.swarm(particles)
        rule = tf_psops.ParticleSwarm(inertia=0, cognitive=0, social=0)  # Stays.
        sync = tf_psops.PSOSync(every, rule)
        after = swarms.Probe(lambda _: sync.fitness)
        swarms.fit(
            model,
            swarms.data(steps, particles),
            sync,
            after,
            epochs=2,
            validation_data=swarms.data(2, particles),
        )
        x, y = (
            a.reshape(steps, particles, swarms.ROWS, *a.shape[1:])
            for a in swarms.arrays(steps, particles)
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        losses = []
        for particle in range(particles):
            alone = swarms.compiled(swarms.dense())
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
        model = swarms.swarm(3)
        sync = tf_psops.PSOSync(1, tf_psops.ParameterAverage())
        swarm = swarms.Probe(lambda model: swarms.weights(model)[2])
        swarms.fit(model, swarms.data(6, 3), sync, swarm)
        alone = swarms.compiled(swarms.dense())
        plain = swarms.Probe(
            lambda model: np.concatenate([w.ravel() for w in model.get_weights()])
        )
        swarms.fit(alone, swarms.data(6, 3), plain)
        self.assertAllClose(swarm.seen, plain.seen, rtol=0, atol=1e-6)

    @parameterized.parameters("own", "global_best")
    def test_particle_swarm_moves_as_its_formula_says(self, take):
        particles, every, steps = 3, 2, 8
        model = swarms.swarm(particles)
        rule = tf_psops.ParticleSwarm(0.4, 0.7, 0.6, take=take, seed=3)
        sync = tf_psops.PSOSync(every, rule)
        start = swarms.weights(model)
        before = swarms.Probe(lambda model: swarms.weights(model).astype("float64"))
        after = swarms.Probe(lambda model: (swarms.weights(model), sync.fitness))
        swarms.fit(model, swarms.data(steps, particles), before, sync, after)

        sizes = [int(np.prod(v.shape)) for v in model.trainable_variables]
        velocity = np.zeros(start.shape)
        best, best_fitness = start.astype("float64"), np.full(particles, np.inf)
        for number, step in enumerate(range(every - 1, steps, every)):
            x, (moved, fitness) = before.seen[step], after.seen[step]
            better = fitness < best_fitness
            best[better], best_fitness[better] = x[better], fitness[better]
            leader = best[best_fitness.argmin()].copy()
            for i in range(particles):
                news = tf_psops.News(
                    None, None, tf.constant(i), tf.constant(number), None, None
                )
                r1, r2 = np.repeat(rule.factors((), news, len(sizes)), sizes, axis=1)
                velocity[i] = (
                    0.4 * velocity[i]
                    + 0.7 * r1 * (best[i] - x[i])
                    + 0.6 * r2 * (leader - x[i])
                )
                expected = leader if take == "global_best" else x[i] + velocity[i]
                self.assertAllClose(moved[i], expected, rtol=0, atol=1e-6)
        self.assertNotAllClose(velocity, np.zeros(start.shape), atol=1e-3)
        for weights in swarms.weights(model):  # Training ends with the global best.
            self.assertAllClose(weights, leader, rtol=0, atol=1e-6)


class WeightAverageTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(6, 100)
    def test_training_ends_with_the_mean_of_the_moving_averages(self, every):
        """Keras puts each particle's in place before it tells that training ends."""
        steps, particles = 6, 2
        ema = {"use_ema": True, "ema_momentum": 0.5}
        model = swarms.swarm(
            particles, optimizer=lambda rate: keras.optimizers.SGD(rate, **ema)
        )
        swarms.fit(
            model,
            swarms.data(steps),
            tf_psops.PSOSync(every, tf_psops.ParameterAverage()),
        )

        x, y = (
            a.reshape(steps, particles, swarms.ROWS, -1) for a in swarms.arrays(steps)
        )
        alone = []
        for i in range(particles):
            plain = swarms.compiled(swarms.dense(), keras.optimizers.SGD(0.1, **ema))
            data = tf.data.Dataset.from_tensor_slices((x[:, i], y[:, i]))
            plain.fit(data, verbose=0)
            alone.append(np.concatenate([w.ravel() for w in plain.get_weights()]))
        self.assertNotAllClose(alone[0], alone[1], atol=1e-3)
        for weights in swarms.weights(model):
            self.assertAllClose(weights, np.mean(alone, axis=0), rtol=0, atol=1e-6)


class OtherStateTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters("average", "local")
    def test_moving_statistics(self, policy):
        model = swarms.swarm(make=lambda: swarms.dense(layers.BatchNormalization()))
        rule = tf_psops.ParameterAverage()
        sync = tf_psops.PSOSync(2, rule, non_trainable=policy)
        mean = model.non_trainable_variables[0]
        before = swarms.Probe(lambda model: np.stack(swarms.local(model, mean)))
        after = swarms.Probe(lambda model: np.stack(swarms.local(model, mean)))
        swarms.fit(model, swarms.data(3), before, sync, after)
        self._check(policy, before.seen[1], after.seen[1])
        for copy in swarms.local(model, mean):  # Training closes on the average.
            self.assertAllClose(copy, after.seen[2].mean(0))

    @parameterized.parameters("average", "local")
    def test_optimizer_slots(self, policy):
        model = swarms.swarm(optimizer=keras.optimizers.Adam)
        rule = tf_psops.ParameterAverage()
        sync = tf_psops.PSOSync(2, rule, optimizer_slots=policy)

        def look(model):
            slots = [v for v in model.optimizer.variables if v.shape == (4, 3)]
            self.assertLen(slots, 2)
            return np.stack([swarms.local(model, slot) for slot in slots], axis=1)

        before, after = swarms.Probe(look), swarms.Probe(look)
        swarms.fit(model, swarms.data(2), before, sync, after)
        self._check(policy, before.seen[1], after.seen[1])

    @parameterized.parameters("float16", "bfloat16")
    def test_small_slots_do_not_travel_rounded(self, payload):
        """Second moments of small gradients underflow in float16."""
        model = swarms.swarm(optimizer=keras.optimizers.Adam, loss_weights=1e-5)

        def look(model):
            slots = [v for v in model.optimizer.variables if v.shape == (4, 3)]
            return np.stack([swarms.local(model, slot) for slot in slots], axis=1)

        sync = tf_psops.PSOSync(
            2,
            tf_psops.ParameterAverage(),
            optimizer_slots="average",
            payload_dtype=payload,
        )
        before, after = swarms.Probe(look), swarms.Probe(look)
        swarms.fit(model, swarms.data(2), before, sync, after)
        self.assertAllInRange(before.seen[1][:, 1], 0, 1e-10)
        for copy in after.seen[1]:
            self.assertAllClose(copy, before.seen[1].mean(0), rtol=1e-6, atol=0)

    @parameterized.parameters(
        lambda rate: keras.optimizers.RMSprop(rate, rho=0.5),
        lambda rate: keras.optimizers.Adam(rate, beta_1=0.5, beta_2=0.5),
    )
    def test_second_moments_stay_positive_where_they_travel_meanwhile(self, optimizer):
        """What a particle has forgotten since then may be more than the mean."""
        model = swarms.swarm(optimizer=optimizer)
        x, y = swarms.arrays(9)
        x[: swarms.ROWS] *= 100
        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(2 * swarms.ROWS)

        def look(model):
            slots = [v for v in model.optimizer.variables if v.shape == (4, 3)]
            return np.stack(swarms.local(model, slots[-1]))

        probe = swarms.Probe(look)
        sync = tf_psops.PSOSync(
            4, tf_psops.ParameterAverage(), optimizer_slots="average", delay=3
        )
        swarms.fit(model, data, sync, probe)
        self.assertGreater(probe.seen[3][0].max(), 100 * probe.seen[3][1].max())
        for slots in probe.seen:
            self.assertAllInRange(slots, 0.0, 1e9)
        self.assertAllInRange(swarms.weights(model), -100, 100)
        self.assertEqual(sync.num_diverged, 0)

    def _check(self, policy, before, after):
        self.assertFalse(swarms.equal(before))
        if policy == "average":
            for copy in after:
                self.assertAllClose(copy, before.mean(0))
        else:
            self.assertAllEqual(after, before)

    def test_frozen_layers_stay_and_do_not_travel(self):
        def make():
            frozen = layers.Dense(4, trainable=False)
            return swarms.dense(frozen, layers.BatchNormalization(trainable=False))

        model = swarms.swarm(make=make)
        start = [v.numpy() for v in model.non_trainable_variables]
        self.assertLen(start, 6)
        seen = set()

        class Spy(tf_psops.ParameterAverage):
            def move(self, state, position, news, tensor_ids):
                seen.add((position.shape[0], tensor_ids.shape[0]))
                return super().move(state, position, news, tensor_ids)

        swarms.fit(model, swarms.data(3), tf_psops.PSOSync(2, Spy()))
        self.assertEqual(seen, {(15, 15)})
        for before, variable in zip(start, model.non_trainable_variables):
            for copy in swarms.local(model, variable):
                self.assertAllEqual(before, copy)


class _Watched(tf_psops.SlowMomentum):
    """Goes on from another place than what travelled, and keeps what it is told."""

    def __init__(self):
        super().__init__(inertia=0.8)
        self.seen = []

    def factors(self, state, news, num_tensors):
        def keep(sync, particle, distances):
            if not particle:
                self.seen.append((int(sync), distances))

        tf.numpy_function(keep, [news.sync, news.particle, news.distances], [])


class DistancesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ({}, False),
        ({}, True),
        ({"payload_dtype": "float16"}, False),
        ({"delay": 1}, False),
    )
    def test_are_from_where_the_swarm_went_on(self, arguments, is_poisoned):
        every, delay = 2, arguments.get("delay", 0)
        rule = _Watched()
        sync = tf_psops.PSOSync(every, rule, **arguments)
        model = swarms.swarm(3)

        def look(model):
            if is_poisoned and len(before.seen) == 2:
                kernel = model.trainable_variables[0].value
                copies = model.distribute_strategy.experimental_local_results(kernel)
                copies[1].assign(copies[1] * np.nan)
            return swarms.weights(model)

        before, after = swarms.Probe(look), swarms.Probe(swarms.weights)
        start = swarms.weights(model)[0]
        swarms.fit(model, swarms.data(9, 3), before, sync, after)
        told = rule.seen[1:]  # Without the warm-up.
        self.assertEqual([number for number, _ in told[:4]], [0, 1, 2, 3])
        went_on_from = start
        for number, distances in told[:4]:
            report = (number + 1) * every - 1
            expected = np.linalg.norm(before.seen[report] - went_on_from, axis=-1)
            expected = np.where(np.isnan(expected), np.inf, expected)
            self.assertEqual(np.isinf(expected).any(), is_poisoned and number == 1)
            self.assertAllClose(distances, expected, rtol=1e-5)
            settle = report + delay
            gone = before.seen[settle][0] - before.seen[report][0]
            went_on_from = after.seen[settle][0] - gone


class PayloadTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (tf_psops.CentroidSwarm, "float16"), (tf_psops.ParticleSwarm, "bfloat16")
    )
    def test_weights_travel_rounded(self, rule, payload):
        def fit(**kwargs):
            model = swarms.swarm(make=lambda: swarms.dense(layers.BatchNormalization()))
            sync = tf_psops.PSOSync(2, rule(), **kwargs)
            swarms.fit(model, swarms.data(6), sync)
            weights = swarms.weights(model)
            self.assertTrue(swarms.equal(weights))
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

        probe = swarms.Probe(poison)
        return probe

    @parameterized.parameters(
        tf_psops.CentroidSwarm(),
        tf_psops.ParameterAverage(),
        tf_psops.ParticleSwarm(),
        tf_psops.ParticleSwarm(take="global_best"),
    )
    def test_others_do_not_catch_it_and_it_is_put_back(self, rule):
        model = swarms.swarm(3)
        sync = tf_psops.PSOSync(2, rule)
        before = swarms.Probe(swarms.weights)
        after = swarms.Probe(lambda model: (swarms.weights(model), sync.fitness))
        values = {1: np.nan, 5: np.inf, 9: 1e5}
        poisons = [self._poison(model, [0], *item) for item in values.items()]
        with self.assertLogs(level="WARNING") as logs:
            swarms.fit(model, swarms.data(12, 3), *poisons, before, sync, after)
        warning = "Particles [0] were out of order"
        self.assertEqual("".join(logs.output).count(warning), 3)
        self.assertEqual(sync.num_diverged, 3)
        for step in values:
            weights, fitness = after.seen[step]
            self.assertAllInRange(weights, -10, 10)
            self.assertAllEqual(np.isfinite(fitness), [False, True, True])
            # The default rule adds a velocity later.
            if rule.exchange == "mean" and (
                step == 1 or isinstance(rule, tf_psops.ParameterAverage)
            ):
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
        model = swarms.swarm(3, optimizer=optimizer)

        def slots(model):
            slot = next(
                v for v in model.optimizer.variables if v.shape == (4, 3)
            )  # That of the kernel.
            return np.stack(swarms.local(model, slot))

        sync = tf_psops.PSOSync(2, tf_psops.ParameterAverage())
        after = swarms.Probe(slots)
        swarms.fit(model, swarms.data(4, 3), self._poison(model, [1], 1), sync, after)
        self.assertAllEqual(after.seen[1][1], np.full([4, 3], np.float32(fresh)))
        for other in (0, 2):
            self.assertNotAllClose(after.seen[1][other], np.full([4, 3], fresh))
        self.assertTrue(np.isfinite(slots(model)).all())

    def test_nobody_in_good_health(self):
        model = swarms.swarm()
        with self.assertRaisesRegex(
            FloatingPointError, "No particle.*synchronisation 1.*inf.*learning rate"
        ):
            poison = self._poison(model, [0, 1], 3)
            swarms.fit(model, swarms.data(6), poison, tf_psops.PSOSync(2))


if __name__ == "__main__":
    tf.test.main()
