"""Parameter averaging, also known as local SGD: the peer to compare a swarm with."""

from typing import Any

import tensorflow as tf

from tf_psops.rules.rule import News, Rule


class ParameterAverage(Rule):
    """Moves every particle to the mean of all positions.

    After every single step of plain SGD this is synchronous SGD; after every n
    steps it is local SGD (Stich, "Local SGD Converges Fast and Communicates
    Little", arXiv 1805.09767).

    Example:

    ```python
    rule = tf_psops.ParameterAverage()
    model.fit(dataset, callbacks=[tf_psops.PSOSync(10, rule)])
    ```
    """

    exchange = "mean"
    needs_fitness = False

    def move(
        self, state: Any, position: tf.Tensor, news: News, tensor_ids: tf.Tensor
    ) -> tuple[Any, tf.Tensor]:
        """Returns the mean position; see `Rule.move`."""
        del position, tensor_ids
        return state, news.vector
