"""A swarm of trial particles around the centroid: the default rule.

The centroid m of the particles' positions costs one all-reduce, and is better than
the position of any of them. The swarm moves on from there by Particle Swarm
Optimisation of one shared position g, the global best, with one shared velocity v. At
a synchronisation every particle makes the same K trial particles, each with an inertia
w_k and a social factor c_k that are drawn anew:

    v_k = w_k*v + c_k*(m - g)
    x_k = g + v_k

Every particle scores every trial on its own latest mini-batch; the mean score over the
swarm is the trial's fitness. The trial of the best fitness is the new global best, from
which all particles go on: g <- x_k, v <- v_k.

Trial 0 has w=0 and c=1: it is the centroid itself, so that the swarm averages wherever
nothing better is found. The trials are functions of what every particle has, and cost
no traffic: what travels is one all-reduce of the weights, and W*K scalars.
"""

from typing import NamedTuple

import tensorflow as tf

from tf_psops import _checks
from tf_psops.rules import _random
from tf_psops.rules.rule import Rule


class CentroidSwarmState(NamedTuple):
    """What one particle remembers; the same on every particle.

    Attributes:
        position: [P], the global best g.
        velocity: [P], how the last synchronisation moved it.
    """

    position: tf.Tensor
    velocity: tf.Tensor


class CentroidSwarm(Rule):
    """Moves all particles to the best of several moves of the swarm's centroid.

    Args:
        trials: K, the number of trial particles, at least 1. The first is the
            centroid itself. Defaults to 4.
        inertia: The largest inertia of a trial, from 0 to below 1. Defaults to 0.9.
        social: The smallest and the largest social factor of a trial, above 0.
            Defaults to (0.5, 1.5).
        seed: Seed of the trials' inertia and social factors. Defaults to 0.

    Raises:
        ValueError: If an argument is out of its range or of a wrong type.

    Example:

    ```python
    rule = tf_psops.CentroidSwarm(trials=8)
    model.fit(dataset, callbacks=[tf_psops.PSOSync(10, rule)])
    ```
    """

    exchange = "mean"

    def __init__(self, trials=4, inertia=0.9, social=(0.5, 1.5), seed=0):
        good = _checks.is_whole(trials) and trials >= 1
        _checks.check(good, "a whole number of at least 1", trials=trials)
        good = _checks.is_real(inertia) and 0 <= inertia < 1
        _checks.check(good, "a number from 0 to below 1", inertia=inertia)
        good = (
            isinstance(social, (tuple, list))
            and len(social) == 2
            and all(map(_checks.is_real, social))
            and 0 < social[0] <= social[1] < float("inf")
        )
        _checks.check(good, "two numbers above 0, the smaller first", social=social)
        _checks.check(_checks.is_whole(seed), "a whole number", seed=seed)
        self.num_trials = int(trials)
        self.inertia = float(inertia)
        self.social = tuple(map(float, social))
        self.seed = int(seed)

    def init(self, position):
        """Returns the state of a swarm at rest."""
        return CentroidSwarmState(tf.identity(position), tf.zeros_like(position))

    def factors(self, news, num_tensors):
        """Returns the inertia and social factor of each trial, [K, 2].

        They depend on (seed, sync) alone, so that all particles have the same.
        """
        del num_tensors
        key = _random.key(self.seed, news.sync)
        draws = _random.uniform([self.num_trials, 2], key)
        low = tf.constant([0.0, self.social[0]])
        high = tf.constant([self.inertia, self.social[1]])
        drawn = low + (high - low) * draws
        return tf.concat([[[0.0, 1.0]], drawn[1:]], axis=0)

    def trial(self, number, state, news, sizes):
        """Returns the position of a trial particle; see `Rule.trial`."""
        del sizes
        return state.position + self._velocity(number, state, news)

    def move(self, state, position, news, sizes):
        """Returns the state and position of the best trial; see `Rule.move`."""
        del position, sizes
        best = tf.argmin(news.scores, output_type=tf.int32)
        velocity = self._velocity(best, state, news)
        moved = state.position + velocity
        return CentroidSwarmState(moved, velocity), moved

    def agreed(self, state, vector):
        """Returns the global best."""
        del vector
        return state.position

    def _velocity(self, number, state, news):
        # Not by slicing: XLA would compile the rule anew for each number.
        factors = tf.gather(news.factors, number)
        factors = tf.cast(factors, news.vector.dtype)
        displacement = news.vector - state.position
        return factors[0] * state.velocity + factors[1] * displacement
