"""Particle Swarm Optimisation of the weights, as PSO-PS puts it.

PSO-PS (arXiv 2009.03816) moves the weights of all workers by a Particle Swarm
Optimisation step where parameter averaging would average them. The step is that
of Kennedy & Eberhart ("Particle Swarm Optimization", ICNN 1995) with the inertia
of Shi & Eberhart ("A modified particle swarm optimizer", ICEC 1998):

    v <- w*v + c1*r1*(p - x) + c2*r2*(g - x)
    x <- x + v

x position, v velocity, p personal best, g global best, w inertia, c1 cognitive,
c2 social, and r1, r2 random factors from U(0, 1).
"""

from typing import Literal, NamedTuple

import tensorflow as tf

from tf_psops import _checks
from tf_psops.rules import _random
from tf_psops.rules.rule import News, Offer, Rule


class ParticleSwarmState(NamedTuple):
    """What one particle remembers.

    Attributes:
        velocity: [P], how the last synchronisation moved it.
        best_position: [P], its personal best.
        best_fitness: Scalar, the fitness there, infinite before the first one.
    """

    velocity: tf.Tensor
    best_position: tf.Tensor
    best_fitness: tf.Tensor


class ParticleSwarm(Rule):
    """Moves every particle by its velocity, its personal best and the global best.

    Between two synchronisations local training moves the particle as well, so the
    constants of plain PSO (w=0.73, c1=c2=1.5) diverge here; the defaults are small.
    A particle whose fitness is not finite never becomes a best.

    Args:
        inertia: w, from 0 to below 1. Defaults to 0.3.
        cognitive: c1, at least 0. Defaults to 0.5.
        social: c2, at least 0. Defaults to 0.5.
        take: Where a particle goes on from: "own", its own moved position, which
            keeps the swarm diverse, or "global_best", the same for all; there is then
            no velocity, and the numbers above have no effect. Defaults to "own".
        seed: Seed of the random factors, one r1 and one r2 for each weight tensor
            of each particle at each synchronisation. Defaults to 0.

    Raises:
        ValueError: If an argument is out of its range or of a wrong type.

    Example:

    ```python
    rule = tf_psops.ParticleSwarm(inertia=0.2, cognitive=0.4, social=0.6)
    model.fit(dataset, callbacks=[tf_psops.PSOSync(10, rule)])
    ```
    """

    exchange = "best"

    def __init__(
        self,
        inertia: float = 0.3,
        cognitive: float = 0.5,
        social: float = 0.5,
        take: Literal["own", "global_best"] = "own",
        seed: int = 0,
    ):
        good = _checks.is_real(inertia) and 0 <= inertia < 1
        _checks.check(good, "a number from 0 to below 1", inertia=inertia)
        for name, value in (("cognitive", cognitive), ("social", social)):
            good = _checks.is_real(value) and 0 <= value < float("inf")
            _checks.check(good, "a finite number of at least 0", **{name: value})
        good = take in ("own", "global_best")
        _checks.check(good, "'own' or 'global_best'", take=take)
        _checks.check(_checks.is_whole(seed), "a whole number", seed=seed)
        self.inertia = float(inertia)
        self.cognitive = float(cognitive)
        self.social = float(social)
        self.take = take
        self.seed = int(seed)

    def init(self, position: tf.Tensor) -> ParticleSwarmState:
        """Returns the state of a particle at rest that has no personal best yet."""
        return ParticleSwarmState(
            velocity=tf.zeros_like(position),
            best_position=tf.identity(position),
            best_fitness=tf.constant(float("inf"), position.dtype),
        )

    def join(
        self, state: ParticleSwarmState, position: tf.Tensor
    ) -> ParticleSwarmState:
        """Returns the state of a particle at rest; see `Rule.join`."""
        del state
        return self.init(position)

    def offer(
        self, state: ParticleSwarmState, position: tf.Tensor, fitness: tf.Tensor
    ) -> tuple[ParticleSwarmState, Offer]:
        """Returns the state with its personal best renewed, and that best."""
        fitness = tf.cast(fitness, position.dtype)
        # Not by `tf.where`, which would copy the vector.
        best_position, best_fitness = tf.cond(
            tf.math.is_finite(fitness) & (fitness < state.best_fitness),
            lambda: (position, fitness),
            lambda: (state.best_position, state.best_fitness),
        )
        state = state._replace(best_position=best_position, best_fitness=best_fitness)
        return state, Offer(best_position, best_fitness)

    def factors(
        self, state: ParticleSwarmState, news: News, num_tensors: int
    ) -> tf.Tensor:
        """Returns the random factors r1 and r2, [2, num_tensors], each from U(0, 1).

        They depend on (seed, sync, particle) alone, so a run repeats bit for bit.
        """
        del state
        key = _random.key(self.seed, news.sync, news.particle)
        return _random.uniform([2, num_tensors], key)

    def move(
        self,
        state: ParticleSwarmState,
        position: tf.Tensor,
        news: News,
        tensor_ids: tf.Tensor,
    ) -> tuple[ParticleSwarmState, tf.Tensor]:
        """Returns the state and position after one PSO step; see `Rule.move`."""
        if self.take == "global_best":
            return state, news.vector
        factors = tf.cast(news.factors, position.dtype)
        velocity = (
            self.inertia * state.velocity
            + tf.gather(self.cognitive * factors[0], tensor_ids)
            * (state.best_position - position)
            + tf.gather(self.social * factors[1], tensor_ids) * (news.vector - position)
        )
        return state._replace(velocity=velocity), position + velocity
