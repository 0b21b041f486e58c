"""Tells particles in good health from those that are out of order."""

import math

import numpy as np
import tensorflow as tf

from tf_psops import _pieces

_FAR = 100.0


class AllDivergedError(FloatingPointError):
    """No particle has a finite loss and finite weights.

    Attributes:
        vote: The largest vote of all workers at this synchronisation.
    """

    def __init__(self, text, vote):
        super().__init__(text)
        self.vote = vote


def have_diverged(fitness, distances):
    """Returns which particles are out of order, [W]: not finite, or far from the rest.

    Far is a hundred times the distance that the others have moved, by the lower median,
    with a loss above theirs: a particle that diverges, before it is NaN.
    """
    finite = np.isfinite(fitness)
    middle, loss = _lower_median(distances[finite]), _lower_median(fitness[finite])
    with np.errstate(invalid="ignore"):
        far = (distances > _FAR * middle) & (fitness > loss) & (middle > 0)
    return ~finite | far


def _lower_median(values):
    return np.sort(values)[(len(values) - 1) // 2]


def distance(one, other):
    """Returns the Euclidean distance of two vectors."""
    (square,) = _pieces.add(
        lambda *pieces: [tf.reduce_sum(tf.math.squared_difference(*pieces))], one, other
    )
    return tf.sqrt(square)


def sampled_distance(one, other):
    """Returns it by `_pieces.sample` of both."""
    part = _pieces.sample(one)
    scale = math.sqrt(one.shape[0] / max(1, part.shape[0]))
    return scale * distance(part, _pieces.sample(other))


def is_finite(vector):
    """Returns whether all elements of a vector are finite, a scalar."""
    # By a sum, which reads the vector once and keeps no copy.
    return tf.math.is_finite(tf.reduce_sum(vector))
