"""Parameter averaging with slow outer momentum."""

from typing import NamedTuple

import tensorflow as tf

from tf_psops import _checks
from tf_psops.rules.rule import News, Rule


class SlowMomentumState(NamedTuple):
    """What one particle remembers; the same on every particle.

    Attributes:
        position: [P], where the last synchronisation led all particles.
        velocity: [P], how it moved them.
        learning_rate: Scalar, that of the local steps before it.
    """

    position: tf.Tensor
    velocity: tf.Tensor
    learning_rate: tf.Tensor


class SlowMomentum(Rule):
    """Moves all particles together, to the mean position and on by momentum.

    SlowMo (Wang, Tantia, Ballas & Rabbat, "SlowMo: Improving communication-efficient
    distributed SGD with slow momentum", arXiv 1910.00643, algorithm 1), with a slow
    learning rate of 1, and r_t for the learning rate before synchronisation t:

        v <- w*(r_t/r_(t-1))*v + (mean(x) - g)
        g <- g + v

    The paper's slow momentum is v/r, a mean of gradients, which every synchronisation
    multiplies by its own rate. The paper has one rate for all local steps between two
    synchronisations; of a schedule that changes it at each, this takes the mean.

    Args:
        inertia: w, from 0 (parameter averaging) to below 1. Defaults to 0.5.

    Raises:
        ValueError: If `inertia` is out of its range.

    Example:

    ```python
    model.fit(dataset, callbacks=[tf_psops.PSOSync(10, tf_psops.SlowMomentum(0.3))])
    ```
    """

    exchange = "mean"
    needs_fitness = False

    def __init__(self, inertia: float = 0.5):
        good = _checks.is_real(inertia) and 0 <= inertia < 1
        _checks.check(good, "a number from 0 to below 1", inertia=inertia)
        self.inertia = float(inertia)

    def init(self, position: tf.Tensor) -> SlowMomentumState:
        """Returns the state of a swarm at rest."""
        return SlowMomentumState(
            position=tf.identity(position),
            velocity=tf.zeros_like(position),
            learning_rate=tf.zeros([], position.dtype),
        )

    def move(
        self,
        state: SlowMomentumState,
        position: tf.Tensor,
        news: News,
        tensor_ids: tf.Tensor,
    ) -> tuple[SlowMomentumState, tf.Tensor]:
        """Returns the moved state and position; see `Rule.move`."""
        del position, tensor_ids
        ratio = tf.math.divide_no_nan(news.learning_rate, state.learning_rate)
        velocity = self.inertia * ratio * state.velocity + news.vector - state.position
        moved = state.position + velocity
        return SlowMomentumState(moved, velocity, news.learning_rate), moved

    def agreed(self, state: SlowMomentumState, vector: tf.Tensor) -> tf.Tensor:
        """Returns where the last synchronisation led all particles."""
        del vector
        return state.position
