"""Averaging with an outer Nesterov momentum, known as DiLoCo."""

from typing import NamedTuple

import tensorflow as tf

from tf_psops import _checks
from tf_psops.rules.rule import News, Rule


class DiLoCoState(NamedTuple):
    """What one particle remembers; the same on every particle.

    Attributes:
        position: [P], where the last synchronisation led all particles.
        velocity: [P], the outer momentum.
    """

    position: tf.Tensor
    velocity: tf.Tensor


class DiLoCo(Rule):
    """Moves all particles together, by Nesterov's momentum of their mean ways.

    DiLoCo (Douillard et al., "DiLoCo: Distributed Low-Communication Training of
    Language Models", arXiv 2311.08105, algorithm 1) takes the way D from the last
    synchronisation to the mean position for the step that an outer optimizer goes,
    which is SGD with Nesterov's momentum:

        D = mean(x) - g
        v <- momentum*v + D
        g <- g + learning_rate*(D + momentum*v)

    The paper's constants, the defaults, are for few synchronisations of large models:
    in the long run they go 0.7 / (1 - 0.9) = 7 times as far as the mean does. With
    few particles, or in short runs, a learning rate of 0.3 is gentler; the best one
    grows with the number of particles ("Communication-Efficient Language Model
    Training Scales Reliably and Robustly", arXiv 2503.09799).

    Args:
        learning_rate: The outer learning rate, above 0. Defaults to 0.7.
        momentum: The outer momentum, from 0 to below 1. Defaults to 0.9.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    ```python
    rule = tf_psops.DiLoCo(learning_rate=0.3)
    model.fit(dataset, callbacks=[tf_psops.PSOSync(50, rule)])
    ```
    """

    exchange = "mean"
    needs_fitness = False

    def __init__(self, learning_rate: float = 0.7, momentum: float = 0.9):
        good = _checks.is_real(learning_rate) and 0 < learning_rate < float("inf")
        _checks.check(good, "a finite number above 0", learning_rate=learning_rate)
        good = _checks.is_real(momentum) and 0 <= momentum < 1
        _checks.check(good, "a number from 0 to below 1", momentum=momentum)
        self.learning_rate = float(learning_rate)
        self.momentum = float(momentum)

    def init(self, position: tf.Tensor) -> DiLoCoState:
        """Returns the state of a swarm at rest."""
        return DiLoCoState(tf.identity(position), tf.zeros_like(position))

    def move(
        self, state: DiLoCoState, position: tf.Tensor, news: News, tensor_ids: tf.Tensor
    ) -> tuple[DiLoCoState, tf.Tensor]:
        """Returns the moved state and position; see `Rule.move`."""
        del position, tensor_ids
        way = news.vector - state.position
        velocity = self.momentum * state.velocity + way
        moved = state.position + self.learning_rate * (way + self.momentum * velocity)
        return DiLoCoState(moved, velocity), moved

    def agreed(self, state: DiLoCoState, vector: tf.Tensor) -> tf.Tensor:
        """Returns where the last synchronisation led all particles."""
        del vector
        return state.position
