"""Elastic averaging: particles on springs to a common centre."""

from typing import NamedTuple

import tensorflow as tf

from tf_psops import _checks
from tf_psops.rules.rule import News, Rule


class ElasticAverageState(NamedTuple):
    """What one particle remembers.

    Attributes:
        center: [P], the centre variable, the same on every particle.
    """

    center: tf.Tensor


class ElasticAverage(Rule):
    """Pulls every particle towards a centre, and the centre towards the particles.

    EASGD (Zhang, Choromanska & LeCun, "Deep learning with Elastic Averaging SGD",
    arXiv 1412.6651, equations 5 and 6), synchronous:

        x_i <- x_i - alpha * (x_i - c)
        c   <- c + beta * (mean(x) - c)         beta = W * alpha

    The centre is what stands for the swarm.

    Args:
        beta: The centre's moving rate, above 0 and at most 1; alpha is beta / W.
            Defaults to 0.9, the paper's.

    Raises:
        ValueError: If `beta` is out of its range.

    Example:

    ```python
    model.fit(dataset, callbacks=[tf_psops.PSOSync(10, tf_psops.ElasticAverage())])
    ```
    """

    exchange = "mean"
    needs_fitness = False

    def __init__(self, beta: float = 0.9):
        good = _checks.is_real(beta) and 0 < beta <= 1
        _checks.check(good, "a number above 0 and at most 1", beta=beta)
        self.beta = float(beta)

    def init(self, position: tf.Tensor) -> ElasticAverageState:
        """Returns the state whose centre is where all particles start."""
        return ElasticAverageState(tf.identity(position))

    def move(
        self,
        state: ElasticAverageState,
        position: tf.Tensor,
        news: News,
        tensor_ids: tf.Tensor,
    ) -> tuple[ElasticAverageState, tf.Tensor]:
        """Returns the moved centre and position; see `Rule.move`."""
        del tensor_ids
        alpha = self.beta / tf.cast(tf.size(news.fitness), position.dtype)
        moved = position - alpha * (position - state.center)
        center = state.center + self.beta * (news.vector - state.center)
        return ElasticAverageState(center), moved

    def agreed(self, state: ElasticAverageState, vector: tf.Tensor) -> tf.Tensor:
        """Returns the centre."""
        del vector
        return state.center
