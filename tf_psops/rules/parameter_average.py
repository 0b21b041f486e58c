"""Parameter averaging, also known as local SGD: the peer to compare a swarm with."""

from tf_psops.rules.rule import Rule


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

    def move(self, state, position, news, tensor_ids):
        """Returns the mean position; see `Rule.move`."""
        del position, tensor_ids
        return state, news.vector
