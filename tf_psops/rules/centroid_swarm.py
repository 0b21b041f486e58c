"""A swarm of trial particles around the centroid: the default rule.

The centroid m of the particles' positions costs one all-reduce, and is better than
the position of any of them. The swarm moves on from there by Particle Swarm
Optimisation of one shared position x with one shared velocity v. At a synchronisation
every particle makes the same trial particles, one for each inertia w_k:

    v_k = w_k*v + (m - x)
    x_k = x + v_k

The first has no inertia: it is the centroid itself. Every particle scores every trial
on its own latest mini-batch, of a large one on a part; the mean score over the swarm is
the trial's fitness. The trial of the best fitness is the global best, the swarm's
answer.

The swarm itself goes on from the trial of the largest inertia whose fitness is not
clearly worse than the centroid's: x <- x_k, v <- v_k. A velocity pays over several
synchronisations, of which a fitness sees only the first. Where no inertia is
acceptable, the swarm averages.

The trials are functions of what every particle has, and cost no traffic: what travels
is one all-reduce of the weights, and W*K scalars.
"""

from typing import NamedTuple

import tensorflow as tf

from tf_psops import _checks
from tf_psops.rules.rule import Rule


class CentroidSwarmState(NamedTuple):
    """What one particle remembers; the same on every particle.

    Attributes:
        position: [P], x, where all particles went on from.
        velocity: [P], v, how the last synchronisation moved them.
        old_velocity: [P], v before that, with which its trials were made.
        best_inertia: Scalar, the inertia of the global best among them.
    """

    position: tf.Tensor
    velocity: tf.Tensor
    old_velocity: tf.Tensor
    best_inertia: tf.Tensor


class CentroidSwarm(Rule):
    """Moves all particles together, past their centroid by an inertia that fits.

    Args:
        inertia: The inertia of each trial particle besides the centroid, numbers above
            0 and below 1. Each costs a forward pass of `num_examples` examples.
            Defaults to (0.3, 0.5).
        tolerance: By what share of the centroid's loss the loss of an acceptable
            trial may be larger, at least 0. Defaults to 0.01.
        num_examples: On how many examples of its latest mini-batch each particle
            scores the trials, at most: the first ones. Models whose inputs have a
            batch size of their own get all. Defaults to 32.

    Raises:
        ValueError: If an argument is out of its range or of a wrong type.

    Example:

    ```python
    rule = tf_psops.CentroidSwarm(inertia=(0.5,))
    model.fit(dataset, callbacks=[tf_psops.PSOSync(10, rule)])
    ```
    """

    exchange = "mean"

    def __init__(self, inertia=(0.3, 0.5), tolerance=0.01, num_examples=32):
        good = isinstance(inertia, (tuple, list)) and all(
            _checks.is_real(w) and 0 < w < 1 for w in inertia
        )
        _checks.check(good, "a tuple of numbers above 0 and below 1", inertia=inertia)
        good = _checks.is_real(tolerance) and 0 <= tolerance < float("inf")
        _checks.check(good, "a finite number of at least 0", tolerance=tolerance)
        good = _checks.is_whole(num_examples) and num_examples >= 1
        _checks.check(good, "a whole number of at least 1", num_examples=num_examples)
        self.inertia = (0.0, *sorted(map(float, inertia)))
        self.tolerance = float(tolerance)
        self.num_trials = len(inertia)
        self.num_examples = int(num_examples)

    def init(self, position):
        """Returns the state of a swarm at rest."""
        return CentroidSwarmState(
            position=tf.identity(position),
            velocity=tf.zeros_like(position),
            old_velocity=tf.zeros_like(position),
            best_inertia=tf.zeros([], position.dtype),
        )

    def trial(self, number, state, news, tensor_ids):
        """Returns the position of a trial particle; see `Rule.trial`."""
        del tensor_ids
        return news.vector + self._inertia(number + 1, state) * state.velocity

    def _inertia(self, choice, state):
        # Not by a slice: XLA would compile the rule anew for each choice.
        return tf.gather(tf.constant(self.inertia, state.velocity.dtype), choice)

    def move(self, state, position, news, tensor_ids):
        """Returns the state and position to go on from; see `Rule.move`."""
        del position
        best = tf.argmin(news.scores, output_type=tf.int32)
        limit = news.scores[0] + self.tolerance * tf.abs(news.scores[0])
        acceptable = tf.math.is_finite(news.scores) & (news.scores <= limit)
        choices = tf.range(len(self.inertia))
        chosen = tf.reduce_max(tf.where(acceptable, choices, 0))
        chosen = tf.where(tf.math.is_finite(news.scores[0]), chosen, best)
        moved = self.trial(chosen - 1, state, news, tensor_ids)
        state = CentroidSwarmState(
            position=moved,
            velocity=moved - state.position,
            old_velocity=state.velocity,
            best_inertia=self._inertia(best, state),
        )
        return state, moved

    def agreed(self, state, vector):
        """Returns the global best."""
        return vector + state.best_inertia * state.old_velocity
