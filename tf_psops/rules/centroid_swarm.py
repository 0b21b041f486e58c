r"""A swarm that flies its centroid, by an inertia of its diversity: the default rule.

The centroid m of the particles' positions costs one all-reduce, and is better than
the position of any of them. The swarm moves on from there by Particle Swarm
Optimisation (Kennedy & Eberhart, ICNN 1995; inertia: Shi & Eberhart, ICEC 1998) of one
shared position x with one shared velocity v. With D = m - x, how far local training has
led the swarm since it went on from x,

    v <- w*v + D
    x <- x + v

The global best, which all particles take, is where the swarm goes on from: the centroid
is the better place for now, but a velocity pays over several synchronisations, which no
loss of one batch can show. What the particles have told each other shows it, for free:

    w = min( inertia * a / (1 + S**2), |D| / (2*|v|) )
    S = ((W-1)*R - 1) / W, at least 0,   R = W*|D|**2 / sum_i |x_i - m|**2
    a = min(cos(D, v) / 0.6, (0.8 - cos(D, v)) / 0.2), at least 0

  * R is the swarm's diversity, turned round: how far its W particles have gone
    together against how far they have gone apart. Of a particle's way, what all have in
    common is progress, and the rest noise; S is the one against the other, squared.
    (Of noise alone the mean of W ways still has a W-th, and R is 1/(W-1): S has that
    taken off, and so it is the same for two particles and for many.) While all fly
    together (S large, early in training), progress is fast and turns: local training
    needs no help, and a velocity carries the swarm off its course. Once they spread,
    each way is mostly noise, and the velocity is its mean over several
    synchronisations. That a swarm is steered by its diversity is an old idea: ARPSO
    (Riget & Vesterstrom, "A diversity-guided particle swarm optimizer", EVALife
    2002-02) repels the particles where it is low; adaptive PSO (Zhan et al., IEEE
    Trans. SMC-B 39(6), 2009) sets w by the particles' mean distances.
  * Particles also spread because they are not stable, at a learning rate that is too
    high. Then D turns back what noise the last one brought, and the cosine falls: of
    pure noise it is negative. After a move that was too far it falls as well.
  * Where the cosine is near 1, all is still progress. With unlike shards only it shows
    that: there the particles spread, and S is small, from the first step.
  * The last term is a velocity clamp. Where a learning rate decays, or few
    synchronisations are left, v is from times of longer ways.

sum_i |x_i - m|**2 is sum_i |x_i - x|**2 - W*|D|**2, of the distances that the particles
report anyway; W counts those in good health. Where rounding makes it 0 or less, w is 0.
From half a million weights on, all of this is of a sample of them, the same everywhere:
at that size what differs from one weight to the next no longer shows in sums. Each
worker adds up and moves its own share of the centroid, so that a swarm of more workers
does so in less time.
Rounded payloads move m alone, by far less than the particles are apart; with a delay
all is measured where the synchronisation started; and a particle that has joined went
on from x like all others, with a shorter way at most, from fresh slots.
At the first synchronisation, and with an inertia of 0, this is parameter averaging.
docs/results.md has what each part does, and how flat it is around the constants.
"""

from typing import NamedTuple

import tensorflow as tf

from tf_psops import _checks, _pieces
from tf_psops.rules.rule import News
from tf_psops.rules.shared_rule import SharedRule

_ALIGNED = 0.6
_STRAIGHT = 0.8
_REACH = 0.5

# As fine as it matters, and so coarse that it is the same on all workers, in whatever
# order their machines add.
_STEPS_OF_INERTIA = 1024


class CentroidSwarmState(NamedTuple):
    """What one particle remembers; the same on every particle.

    Attributes:
        position: [P], x, where all particles went on from.
        previous: [P], where they did the time before.
    """

    position: tf.Tensor
    previous: tf.Tensor

    @property
    def velocity(self) -> tf.Tensor:
        """Returns v, how the last synchronisation moved them."""
        return self.position - self.previous


class CentroidSwarmFactors(NamedTuple):
    """What a move is made by, scalars; the same on every particle.

    Attributes:
        inertia: w.
        cohesion: R, infinite where rounding leaves no distance from the centroid.
        way: |D|, how far the centroid is from where all particles went on.
        spread: The root of the mean of |x_i - m|**2.
    """

    inertia: tf.Tensor
    cohesion: tf.Tensor
    way: tf.Tensor
    spread: tf.Tensor


class CentroidSwarm(SharedRule):
    """Moves all particles together, to their centroid and on by an inertia that fits.

    The swarm's position x and velocity v, the same for all particles, move by

        v <- w*v + (m - x)
        x <- x + v

    where m is the centroid. The inertia w falls where the particles fly together, where
    their centroid turns from its course, and where its ways get shorter. What it is
    made of is free: distances that the particles report anyway. The docstring of
    `tf_psops.rules.centroid_swarm` has the formula and its reasons.

    Args:
        inertia: The largest w, from 0 (parameter averaging) to below 1. Defaults to
            0.5.

    Raises:
        ValueError: If `inertia` is out of its range.

    Example:

    ```python
    rule = tf_psops.CentroidSwarm(inertia=0.3)
    model.fit(dataset, callbacks=[tf_psops.PSOSync(10, rule)])
    ```
    """

    needs_fitness = False

    def __init__(self, inertia: float = 0.5):
        good = _checks.is_real(inertia) and 0 <= inertia < 1
        _checks.check(good, "a number from 0 to below 1", inertia=inertia)
        self.inertia = float(inertia)

    def init(self, position: tf.Tensor) -> CentroidSwarmState:
        """Returns the state of a swarm at rest."""
        return CentroidSwarmState(tf.identity(position), tf.identity(position))

    def sums(self, state: CentroidSwarmState, mean: tf.Tensor) -> list[tf.Tensor]:
        """Returns |D|**2, |v|**2 and D*v, by a sample where vectors are long."""

        def products(mean, *pieces):
            piece = CentroidSwarmState(*pieces)
            way, velocity = mean - piece.position, piece.velocity
            halves = tf.nn.l2_loss(way), tf.nn.l2_loss(velocity)
            return *halves, tf.reduce_sum(way * velocity)

        sample = [_pieces.sample(vector) for vector in (mean, *state)]
        way, speed, along = _pieces.add(products, *sample)
        whole = mean.shape[0] / max(1, sample[0].shape[0])
        return [2 * whole * way, 2 * whole * speed, whole * along]

    def factors(
        self, state: CentroidSwarmState, news: News, num_tensors: int
    ) -> CentroidSwarmFactors:
        """Returns the inertia, and what it is made of."""
        del state, num_tensors
        way, speed, along = news.sums
        in_order = tf.math.is_finite(news.distances)
        distances = tf.where(in_order, tf.cast(news.distances, tf.float64), 0)
        count = tf.reduce_sum(tf.cast(in_order, tf.float64))
        together = count * way
        apart = tf.reduce_sum(distances**2) - together
        ratio = tf.where(apart > 0, together / apart, float("inf"))
        cosine = tf.math.divide_no_nan(along, tf.sqrt(way * speed))
        aligned = tf.minimum(
            cosine / _ALIGNED, (_STRAIGHT - cosine) / (_STRAIGHT - _ALIGNED)
        )
        inertia = self.inertia * tf.maximum(aligned, 0)
        progress = ((count - 1) * ratio - 1) / count
        progress = tf.where((apart > 0) & (count > 1), progress, float("inf"))
        inertia /= 1 + tf.maximum(progress, 0) ** 2
        reach = _REACH * tf.sqrt(tf.math.divide_no_nan(way, speed))
        inertia = tf.round(tf.minimum(inertia, reach) * _STEPS_OF_INERTIA)
        return CentroidSwarmFactors(
            inertia=tf.cast(inertia / _STEPS_OF_INERTIA, news.vector.dtype),
            cohesion=ratio,
            way=tf.sqrt(way),
            spread=tf.sqrt(tf.maximum(apart, 0) / count),
        )

    def lead(
        self, state: CentroidSwarmState, mean: tf.Tensor, factors: CentroidSwarmFactors
    ) -> tf.Tensor:
        """Returns x + v; see `SharedRule.lead`."""
        step = state.velocity
        step *= factors.inertia
        mean += step
        return mean

    def follow(
        self, state: CentroidSwarmState, position: tf.Tensor
    ) -> CentroidSwarmState:
        """Returns the state after a move; see `SharedRule.follow`."""
        return CentroidSwarmState(position, state.position)

    def measures(self, state: CentroidSwarmState, news: News) -> dict[str, tf.Tensor]:
        """Returns `CentroidSwarmFactors` by their names."""
        del state
        return news.factors._asdict()

    def agreed(self, state: CentroidSwarmState, vector: tf.Tensor) -> tf.Tensor:
        """Returns the global best, where the last synchronisation led all particles."""
        del vector
        return state.position
