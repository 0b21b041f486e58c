"""A swarm that flies its centroid, with an inertia by its diversity: the default rule.

The centroid m of the particles' positions costs one all-reduce, and is better than
the position of any of them. The swarm moves on from there by Particle Swarm
Optimisation of one shared position x with one shared velocity v:

    v <- w*v + (m - x)
    x <- x + v
"""

from typing import NamedTuple

import tensorflow as tf

from tf_psops import _checks
from tf_psops.rules.rule import News, Rule

_COHESION = 1.3
_ALIGNMENT = 0.6


class CentroidSwarmState(NamedTuple):
    """What one particle remembers; the same on every particle.

    Attributes:
        position: [P], x, where all particles went on from.
        velocity: [P], v, how the last synchronisation moved them.
    """

    position: tf.Tensor
    velocity: tf.Tensor


class CentroidSwarm(Rule):
    """Moves all particles together, to their centroid and on by an inertia that fits.

    Args:
        inertia: The largest inertia, from 0 (parameter averaging) to below 1.
            Defaults to 0.5.

    Raises:
        ValueError: If `inertia` is out of its range.

    Example:

    ```python
    rule = tf_psops.CentroidSwarm(inertia=0.3)
    model.fit(dataset, callbacks=[tf_psops.PSOSync(10, rule)])
    ```
    """

    exchange = "mean"
    needs_fitness = False

    def __init__(self, inertia: float = 0.5):
        good = _checks.is_real(inertia) and 0 <= inertia < 1
        _checks.check(good, "a number from 0 to below 1", inertia=inertia)
        self.inertia = float(inertia)

    def init(self, position: tf.Tensor) -> CentroidSwarmState:
        """Returns the state of a swarm at rest."""
        return CentroidSwarmState(tf.identity(position), tf.zeros_like(position))

    def move(
        self,
        state: CentroidSwarmState,
        position: tf.Tensor,
        news: News,
        tensor_ids: tf.Tensor,
    ) -> tuple[CentroidSwarmState, tf.Tensor]:
        """Returns the moved state and position; see `Rule.move`."""
        del position, tensor_ids
        way = news.vector - state.position
        inertia = self._inertia(way, state.velocity, news.distances)
        moved = news.vector + inertia * state.velocity
        return CentroidSwarmState(moved, moved - state.position), moved

    def _inertia(self, way, velocity, distances):
        """Returns w, a scalar; see the module's docstring."""
        in_order = tf.math.is_finite(distances)
        distances = tf.where(in_order, tf.cast(distances, tf.float64), 0)
        together = _dot(way, way)
        apart = tf.reduce_sum(distances**2)
        together *= tf.reduce_sum(tf.cast(in_order, tf.float64))
        apart = tf.maximum(apart - together, 0)
        cohesion = tf.where(apart > 0, together / apart, float("inf"))
        lengths = tf.sqrt(_dot(way, way) * _dot(velocity, velocity))
        alignment = tf.math.divide_no_nan(_dot(way, velocity), lengths)
        inertia = self.inertia * tf.clip_by_value(alignment / _ALIGNMENT, 0, 1)
        return tf.cast(inertia / (1 + (cohesion / _COHESION) ** 2), way.dtype)

    def agreed(self, state: CentroidSwarmState, vector: tf.Tensor) -> tf.Tensor:
        """Returns the global best, where the last synchronisation led all particles."""
        del vector
        return state.position


def _dot(one, other):
    """Returns the inner product of two vectors, float64, by XLA without copies."""
    return tf.reduce_sum(tf.cast(one, tf.float64) * tf.cast(other, tf.float64))
