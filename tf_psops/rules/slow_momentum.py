"""Parameter averaging with slow outer momentum."""

from typing import NamedTuple

import tensorflow as tf

from tf_psops import _checks
from tf_psops.rules.rule import Rule


class SlowMomentumState(NamedTuple):
    """What one particle remembers; the same on every particle.

    Attributes:
        position: [P], where the last synchronisation led all particles.
        velocity: [P], how it moved them.
    """

    position: tf.Tensor
    velocity: tf.Tensor


class SlowMomentum(Rule):
    """Moves all particles together, to the mean position and on by momentum.

    SlowMo (Wang, Tantia, Ballas & Rabbat, "SlowMo: Improving communication-efficient
    distributed SGD with slow momentum", arXiv 1910.00643, algorithm 1), with a slow
    learning rate of 1:

        v <- w*v + (mean(x) - g)
        g <- g + v

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

    def __init__(self, inertia=0.5):
        good = _checks.is_real(inertia) and 0 <= inertia < 1
        _checks.check(good, "a number from 0 to below 1", inertia=inertia)
        self.inertia = float(inertia)

    def init(self, position):
        """Returns the state of a swarm at rest."""
        return SlowMomentumState(tf.identity(position), tf.zeros_like(position))

    def move(self, state, position, news, tensor_ids):
        """Returns the moved state and position; see `Rule.move`."""
        del position, tensor_ids
        velocity = self.inertia * state.velocity + (news.vector - state.position)
        moved = state.position + velocity
        return SlowMomentumState(moved, velocity), moved

    def agreed(self, state, vector):
        """Returns where the last synchronisation led all particles."""
        del vector
        return state.position
