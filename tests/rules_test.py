"""Tests of `tf_psops.rules`: the mathematics, without a cluster and without Keras."""

import fractions
import functools
import inspect
import itertools
import math
import re
from unittest import mock

import hypothesis
import numpy as np
import tensorflow as tf
from absl.testing import parameterized
from hypothesis import strategies as st

import tf_psops
from tf_psops import rules

_INF, _NAN = float("inf"), float("nan")
_SIZES = (1, 2, 3)
_TENSOR_IDS = np.repeat(range(3), _SIZES)
_TAKES = ("own", "global_best")
_FLOATS = (np.float32, np.float64)

_few_examples = hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
_coefficients = st.floats(0, 0.99)
_elements = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
_positions = st.lists(_elements, min_size=6, max_size=6).map(np.array)
_unsound = st.sampled_from([_NAN, _INF, -_INF])


def _news(vector, particle=0, sync=0):
    return rules.News(
        vector=tf.constant(vector),
        fitness=tf.zeros([3], tf.float64),
        particle=tf.constant(particle),
        sync=tf.constant(sync),
        learning_rate=tf.constant(0.1),
        distances=tf.zeros([3]),
    )


def _with_factors(r1, r2, **kwargs):
    """Returns a `ParticleSwarm` with given factors, one of each per tensor."""
    rule = rules.ParticleSwarm(**kwargs)
    rule.factors = lambda state, news, num_tensors: tf.constant([r1, r2], tf.float32)
    return rule


def _move(rule, state, position, news, tensor_ids):
    """Moves as a swarm does: the random factors are drawn beforehand."""
    news = news._replace(factors=rule.factors(state, news, max(tensor_ids) + 1))
    return rule.move(state, position, news, tensor_ids)


def _fly(rule, start, kicks, fitness, compiled=False):
    """Returns the positions, [S, W, P], and last states of a swarm of W in S syncs.

    Args:
        rule: A `Rule`.
        start: [P], where all particles start.
        kicks: [S, W, P], how training moves the particles before each sync.
        fitness: [S, W].
        compiled: Whether XLA compiles the rule.
    """
    offer, move = rule.offer, lambda *args: rule.move(*args, _TENSOR_IDS)
    draw = functools.partial(rule.factors, num_tensors=len(_SIZES))
    if compiled:
        offer = tf.function(offer, jit_compile=True)
        move = tf.function(move, jit_compile=True)
    positions = [tf.constant(start)] * kicks.shape[1]
    states = [rule.init(position) for position in positions]
    flown = []
    for sync in range(len(kicks)):
        positions = [x + kick for x, kick in zip(positions, kicks[sync])]
        states, offers = zip(*map(offer, states, positions, fitness[sync]))
        best = offers[np.argmin([offer.score for offer in offers])].vector
        news = [_news(best, particle, sync) for particle in range(len(positions))]
        news = [n._replace(factors=draw(state, n)) for state, n in zip(states, news)]
        states, positions = zip(*map(move, states, positions, news))
        flown.append(np.stack(positions))
    return np.stack(flown), states


def _fly_in_numpy(rule, start, kicks, fitness):
    """Does what `_fly` does by the formula, from the history of the whole swarm."""
    num_syncs, num_particles, _ = kicks.shape
    x = np.tile(np.float64(start), [num_particles, 1])
    v = np.zeros_like(x)
    visited, flown = [], []
    for sync in range(num_syncs):
        x = x + kicks[sync]
        visited.append(x)
        scores = np.where(np.isfinite(fitness), fitness, _INF)[: sync + 1]
        p = [
            visited[row.argmin()][i] if row.min() < _INF else start
            for i, row in enumerate(scores.T)
        ]
        g = p[scores.min(axis=0).argmin()]
        for i in range(num_particles if rule.take == "own" else 0):
            factors = rule.factors((), _news(g, i, sync), len(_SIZES)).numpy()
            r1, r2 = np.repeat(np.float64(factors), _SIZES, axis=1)
            v[i] *= rule.inertia
            v[i] += rule.cognitive * r1 * (p[i] - x[i]) + rule.social * r2 * (g - x[i])
        x = x + v if rule.take == "own" else np.tile(g, [num_particles, 1])
        flown.append(x)
    return np.stack(flown), v, p


class ParticleSwarmFormulaTest(parameterized.TestCase, tf.test.TestCase):
    def _assert_offer(self, offer, vector, score):
        self.assertAllEqual(offer.vector, vector)
        self.assertAllEqual(offer.score, score)

    @parameterized.product(take=_TAKES, compiled=(False, True), dtype=_FLOATS)
    def test_numpy_swarm(self, take, compiled, dtype):
        rng = np.random.default_rng(7)
        start, kicks = rng.normal(size=6), rng.normal(size=(6, 3, 6))
        fitness = rng.uniform(1, 2, size=(6, 3))
        fitness[0, 2] = fitness[4, 0] = _INF
        fitness[3, 1] = _NAN
        swarm = dtype(start), dtype(kicks), dtype(fitness)
        rule = rules.ParticleSwarm(0.4, 0.6, 0.8, take, seed=5)
        flown, states = _fly(rule, *swarm, compiled)
        velocities, bests, _ = zip(*states)
        expected = _fly_in_numpy(rule, *swarm)
        error = 20 * np.finfo(dtype).eps
        for got, value in zip((flown, velocities, bests), expected):
            self.assertAllClose(got, value, rtol=error, atol=error)

    def test_one_move_by_hand(self):
        coefficients = dict(inertia=0.5, cognitive=1, social=2)
        rule = _with_factors([0.5, 0.25], [0.25, 0.5], **coefficients)
        x, best = tf.constant([1.0, 2.0, 3.0]), tf.constant([3.0, 2.0, 1.0])
        state, _ = rule.offer(rule.init(best), best, 0.5)
        state = state._replace(velocity=tf.constant([2.0, 4.0, -2.0]))
        state, moved = _move(rule, state, x, _news([7.0, 0.0, 3.0]), [0, 1, 1])
        # .5*2 + .5*2 + 2*.25*6,  .5*4 + .25*0 + 2*.5*-2,  .5*-2 + .25*-2 + 2*.5*0
        self.assertAllEqual(state.velocity, [5.0, 0.0, -1.5])
        self.assertAllEqual(moved, [6.0, 2.0, 1.5])
        self.assertAllEqual(state.best_position, best)
        self.assertAllEqual(state.best_fitness, 0.5)

    def test_two_syncs_by_hand(self):
        rule = _with_factors([1.0], [1.0], inertia=0.25, cognitive=0.5, social=0.5)
        state = rule.init(tf.constant([0.0]))
        state, offer = rule.offer(state, tf.constant([4.0]), 1.0)
        self._assert_offer(offer, [4.0], 1.0)
        state, moved = _move(rule, state, tf.constant([4.0]), _news([8.0]), [0])
        self.assertAllEqual(moved, [6.0])
        # Training leads on to 7, and that is worse: 4 stays the personal best.
        state, offer = rule.offer(state, tf.constant([7.0]), 2.0)
        self._assert_offer(offer, [4.0], 1.0)
        state, moved = _move(rule, state, tf.constant([7.0]), _news([8.0]), [0])
        self.assertAllEqual(moved, [7.0 + 0.25 * 2 + 0.5 * (4 - 7) + 0.5 * (8 - 7)])
        # As good a place does not take over: an equal score is an equal vector.
        _, offer = rule.offer(state, tf.constant([5.0]), 1.0)
        self._assert_offer(offer, [4.0], 1.0)

    def test_pulls_to_the_start_without_a_personal_best(self):
        rule = _with_factors([1.0], [1.0], cognitive=0.5, social=0)
        state, offer = rule.offer(rule.init(tf.ones([1])), tf.constant([3.0]), _INF)
        self._assert_offer(offer, [1.0], _INF)
        _, moved = _move(rule, state, tf.constant([3.0]), _news([9.0]), [0])
        self.assertAllEqual(moved, [2.0])

    @parameterized.product(dtype=_FLOATS, fitness=_FLOATS)
    def test_keeps_dtype(self, dtype, fitness):
        # The type of a coefficient must not get in the way.
        half = fractions.Fraction(1, 2)
        rule = rules.ParticleSwarm(half, np.float64(0.5), np.float32(0.5))
        position = tf.fill([6], tf.constant(1 / 3, dtype))
        state, offer = rule.offer(rule.init(position), position, tf.ones([], fitness))
        news = _news(offer.vector)
        moved = _move(rule, state, position, news, _TENSOR_IDS)
        for value in tf.nest.flatten([offer, moved]):
            self.assertEqual(value.dtype, dtype)
        self.assertAllEqual(offer.vector, position)


class ParticleSwarmFactorsTest(tf.test.TestCase):
    def test_uniform_from_0_to_below_1(self):
        factors = rules.ParticleSwarm().factors((), _news([0.0]), 10_000)
        self.assertEqual((factors.shape, factors.dtype), ((2, 10_000), tf.float32))
        self.assertAllInRange(factors, 0.0, 1.0, open_upper_bound=True)
        for row in factors.numpy():
            tenths, _ = np.histogram(row, bins=10, range=(0, 1))
            self.assertAllInRange(tenths, 850, 1150)

    def test_all_differ(self):
        seeds = (0, 1, -1, 2**31 - 1, 2**31, 2**32)
        drawn = [
            rules.ParticleSwarm(seed=seed).factors((), _news([0.0], particle, sync), 3)
            for seed, particle, sync in itertools.product(seeds, range(3), range(3))
        ]
        self.assertLen(np.unique(drawn), len(seeds) * 3 * 3 * 2 * 3)

    def test_repeat_bit_for_bit(self):
        news = _news([0.0], particle=2, sync=3)
        draw = functools.partial(
            rules.ParticleSwarm(seed=4).factors, (), num_tensors=33
        )
        first = draw(news)
        self.assertAllEqual(draw(news), first)
        self.assertAllEqual(tf.function(draw)(news), first)
        self.assertAllEqual(tf.function(draw, jit_compile=True)(news), first)

    def test_golden(self):
        # A change of these changes the runs of every user.
        factors = rules.ParticleSwarm(seed=1).factors((), _news([0.0], 2, 3), 2)
        self.assertAllEqual(factors * 2**24, [[7109400, 15995777], [100948, 10440378]])


class ParticleSwarmPropertiesTest(tf.test.TestCase):
    @_few_examples
    @hypothesis.given(_positions, *[_coefficients] * 3, st.sampled_from(_TAKES))
    def test_swarm_in_one_place_stays_put(self, x, inertia, cognitive, social, take):
        rule = rules.ParticleSwarm(inertia, cognitive, social, take)
        flown, states = _fly(rule, x, np.zeros([2, 2, 6]), np.ones([2, 2]))
        self.assertAllEqual(flown, np.broadcast_to(x, [2, 2, 6]))
        self.assertAllEqual([state.velocity for state in states], np.zeros([2, 6]))

    @_few_examples
    @hypothesis.given(st.lists(_positions, min_size=3, max_size=3), st.integers(0, 2))
    def test_social_alone_lands_on_the_global_best(self, kicks, best):
        ones = [1.0] * 3
        rule = _with_factors(ones, ones, inertia=0, cognitive=0, social=1)
        fitness = np.where(np.arange(3) == best, 0.5, 0.7)[None]
        flown, _ = _fly(rule, np.zeros(6), np.array(kicks)[None], fitness)
        self.assertAllClose(flown[0], [kicks[best]] * 3, rtol=1e-9, atol=1e-9)

    @_few_examples
    @hypothesis.given(st.lists(st.one_of(_elements, _unsound), max_size=8))
    def test_best_is_the_lowest_finite_fitness_so_far(self, fitness):
        rule = rules.ParticleSwarm()
        state = rule.init(tf.constant([-1.0]))
        best, best_visit = _INF, -1.0
        for visit, value in enumerate(fitness):
            if math.isfinite(value) and value < best:
                best, best_visit = value, visit
            # An unsound particle's weights are as bad as its loss.
            position = visit if math.isfinite(value) else _NAN
            before = state.best_fitness
            state, offer = rule.offer(state, tf.constant([position], tf.float32), value)
            self.assertAllLessEqual(state.best_fitness, before)
            self.assertAllEqual([*offer.vector, offer.score], [best_visit, best])
            self.assertAllEqual(state.best_position, offer.vector)
            self.assertAllEqual(state.best_fitness, offer.score)


class ParticleSwarmArgumentsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        *(("inertia", value) for value in (-0.1, 1.0, _NAN, _INF, "x", None, True)),
        *(("cognitive", value) for value in (-1, _INF, _NAN, "x", None, True, [1])),
        *(("social", value) for value in (-1, _INF, _NAN, "x", None, True, 1j)),
        *(("take", value) for value in ("mine", None, 1)),
        *(("seed", value) for value in (1.5, True, "1", None)),
    )
    def test_names_a_bad_argument(self, name, value):
        message = re.escape(f"{name}={value!r}")
        with self.assertRaisesRegex(ValueError, f"`{name}`.*Expected.*{message}"):
            rules.ParticleSwarm(**{name: value})

    @parameterized.parameters(
        dict(inertia=0, cognitive=0, social=0, seed=-3),
        dict(inertia=0.999, cognitive=5, social=np.float32(0.5), seed=np.int64(3)),
    )
    def test_keeps_a_good_argument(self, **kwargs):
        rule = rules.ParticleSwarm(**kwargs)
        self.assertEqual({name: getattr(rule, name) for name in kwargs}, kwargs)


class OtherRulesTest(parameterized.TestCase, tf.test.TestCase):
    def test_parameter_average_moves_to_the_mean(self):
        rule = rules.ParameterAverage()
        self.assertEqual(rule.exchange, "mean")
        state, moved = rule.move((), tf.zeros([6]), _news([3.0] * 6), _TENSOR_IDS)
        self.assertEqual(state, ())
        self.assertAllEqual(moved, [3.0] * 6)

    def test_defaults(self):
        rule, position = rules.Rule(), tf.constant([1.0, 2.0])
        self.assertEqual((rule.exchange, rule.init(position)), ("mean", ()))
        state, offer = rule.offer(("kept",), position, tf.constant(0.5))
        self.assertEqual(state, ("kept",))
        self.assertIs(offer.vector, position)
        self.assertAllEqual(offer.score, 0.5)
        self.assertEqual(rule.agreed((), "the vector"), "the vector")
        with self.assertRaises(NotImplementedError):
            rule.move((), position, _news([0.0, 0.0]), [0, 0])

    def test_particle_swarm_exchanges_and_agrees_on_the_best(self):
        rule = rules.ParticleSwarm()
        self.assertEqual((rule.exchange, rule.agreed((), "best")), ("best", "best"))

    @parameterized.parameters(rules.Rule, rules.ParameterAverage, rules.ParticleSwarm)
    def test_example_of_the_docstring(self, cls):
        [example] = re.findall("```python\n(.*?)```", inspect.getdoc(cls), re.DOTALL)
        model = mock.Mock()
        names = {"tf_psops": tf_psops, "model": model, "dataset": object()}
        exec(example, names)
        [callback] = model.fit.call_args.kwargs["callbacks"]
        self.assertIsInstance(callback.rule, names.get("HalfWay", cls))
        if cls is rules.Rule:
            start, kicks = np.zeros(6), np.array([[[4.0] * 6, [8.0] * 6]])
            flown, _ = _fly(callback.rule, start, kicks, np.array([[2.0, 1.0]]))
            self.assertAllEqual(flown, [[[6.0] * 6, [8.0] * 6]])


if __name__ == "__main__":
    tf.test.main()
