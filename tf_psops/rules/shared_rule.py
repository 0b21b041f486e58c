"""A rule of one position that all particles share."""

from typing import Any

import tensorflow as tf

from tf_psops.rules.rule import News, Rule


class SharedRule(Rule):
    """Leads all particles on from the mean of their positions to one position.

    The state is the same for all of them, of vectors, [P]. So each worker need not lead
    all of the mean: it leads the share of it that it has made, before it gathers those
    of the others. Its functions get vectors of any length, that of a share or P.
    """

    exchange = "mean"

    def sums(self, state: Any, mean: tf.Tensor) -> list[tf.Tensor]:
        """Returns sums over the elements, float64 scalars, of which all get the total.

        Args:
            state: The state.
            mean: The mean of all offers.
        """
        raise NotImplementedError

    def lead(self, state: Any, mean: tf.Tensor, factors: Any) -> tf.Tensor:
        """Returns the position to go on from.

        Element by element, by operators that change a NumPy array in place: it leads
        such arrays, too, where there is no GPU.

        Args:
            state: The state.
            mean: The mean of all offers, in whose place the position comes.
            factors: What `factors` returned, of the total of `sums` in `News.sums`.
        """
        raise NotImplementedError

    def follow(self, state: Any, position: tf.Tensor) -> Any:
        """Returns the state of particles that have gone to a position.

        Args:
            state: The state before.
            position: [P], what `lead` made of the mean.
        """
        raise NotImplementedError

    def move(
        self, state: Any, position: tf.Tensor, news: News, tensor_ids: tf.Tensor
    ) -> tuple[Any, tf.Tensor]:
        """Returns the moved state and position; see `Rule.move`."""
        del position, tensor_ids
        position = self.lead(state, news.vector, news.factors)
        return self.follow(state, position), position
