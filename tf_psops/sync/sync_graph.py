"""What of a synchronisation TensorFlow runs: its traced functions."""

import functools
import itertools
import math

import tensorflow as tf

from tf_psops import _traced, _zeros
from tf_psops.sync import divergence


class SyncGraph:
    """Makes the tensors of a synchronisation from those that the particles hold.

    All workers must call `settle` and `close` at the same time. The first call
    of each function traces and compiles it.

    Args:
        rule: A `CompiledRule`.
        collectives: The swarm's `Collectives`.
        particles: The local `Particles`.
        loss_tracker: Their `LossTracker`.
        delayed: Whether particles take local steps between `report` and `settle`.
    """

    def __init__(self, rule, collectives, particles, loss_tracker, delayed):
        self._rule = rule
        self._collectives = collectives
        self._particles = particles
        self._loss_tracker = loss_tracker
        self._delayed = delayed

    @_traced.once
    def report(self):
        """Returns a row of each local particle, and what they bring.

        A row, [6], has its fitness, NaN where it is unknown, score, steps, distance
        from the position that stands for the swarm, that of a sample of the elements,
        and learning rate. Then come positions, offers, what of the rule's states is
        new, and the state to be averaged.
        """
        particles = self._particles
        sums = particles.share(
            particles.each(lambda r: self._loss_tracker.sums(r).read_value())
        )

        def report(replica):
            position = particles.weights.pack(replica)
            # Parts of it from here on, so that they are in memory once.
            particles.weights.unpack(replica, position)
            loss, is_known = self._loss_tracker.loss(sums[replica])
            loss = tf.cast(loss, position.dtype)
            agreed = particles.agreed_position(replica)
            # Not finite either where an element of one of the two is not.
            distance = divergence.distance(position, agreed)
            sound = tf.cond(
                tf.math.is_finite(distance),
                lambda: True,
                # Then it is the rule that is out of order, which `close` tells.
                lambda: ~divergence.is_finite(agreed),
            )
            fitness = tf.where(sound & tf.math.is_finite(loss), loss, float("inf"))
            # A loss that is unknown says nothing of a particle's health.
            unknown = sound & ~is_known
            before = particles.state(replica)
            state, offer = self._rule.offer(before, position, fitness)
            pairs = list(zip(tf.nest.flatten(before), tf.nest.flatten(state)))
            # Who held the rest could not change it in place.
            self._is_new = [old is not new for old, new in pairs]
            state = [new for old, new in pairs if old is not new]
            steps, rate = self._loss_tracker.steps_and_rate(replica)
            row = (
                tf.where(unknown, tf.cast(math.nan, fitness.dtype), fitness),
                offer.score,
                steps,
                distance,
                divergence.sampled_distance(position, agreed),
                rate,
            )
            row = tf.stack([tf.cast(value, tf.float64) for value in row])
            with tf.control_dependencies([row]):
                self._loss_tracker.close(replica)
            return row, position, offer.vector, state, particles.averaged.pack(replica)

        *reports, own = zip(*particles.each(report))
        return *reports, particles.share(own)

    @_traced.once
    def settle(self, news_of_all, positions, states, own, vectors, averaged, led):
        """Moves the local particles by what travelled.

        Args:
            news_of_all: The `News` of all particles.
            positions: The local particles' positions, as `report` returned them.
            states: What of the states of their rule is new, likewise.
            own: Their state to be averaged, likewise.
            vectors: The vector that travelled, on each device.
            averaged: The mean of the state, on each device.
            led: The factors by which a rule has led the vector on, and whether to where
                it is finite; `None` if none has.

        Returns:
            Whether the rule gave a finite position, for each local particle; and what
            the rule has to log of the first of them, a dict of scalars.
        """
        particles, first = self._particles, self._particles.indices.start
        mine = [
            tf.math.is_finite(news_of_all.fitness)[place]
            for place in particles.each(lambda r: first + particles.place(r))
        ]

        def recall(replica):
            # What a sick particle remembers is from before it was sick.
            memory = tf.nest.flatten(particles.rule_state[replica])
            for variable, value in zip(
                itertools.compress(memory, self._is_new), states[replica], strict=True
            ):
                variable.assign(
                    tf.cond(
                        mine[replica],
                        lambda value=value: tf.identity(value),
                        variable.read_value,
                    )
                )

        particles.each(recall)

        def way(replica, flattening, start):
            """Returns how far a particle has gone on since the start."""
            return tf.cond(
                mine[replica],
                lambda: flattening.pack(replica) - start,
                lambda: _zeros.like(start),
            )

        if self._delayed:
            ways = particles.each(lambda r: way(r, particles.weights, positions[r]))

        def learn(replica):
            if self._delayed:
                now = particles.averaged.pack(replica)
                gone = way(replica, particles.averaged, own[replica])
            self._loss_tracker.leave_out_nan(replica)
            particles.take_averaged(replica, averaged[replica])
            if self._delayed:
                moved = averaged[replica] + gone
                # A variance or a second moment may have forgotten more than the mean.
                least = tf.minimum(averaged[replica], now)
                moved = tf.where((moved < 0) & (least >= 0), least, moved)
                particles.averaged.unpack(replica, moved)
            news = news_of_all._replace(
                vector=vectors[replica],
                particle=tf.constant(first + particles.place(replica)),
            )
            if led:
                return news._replace(factors=led[0])
            factors = self._rule.factors(
                particles.state(replica),
                news,
                len(particles.weights.variables[replica]),
            )
            return news._replace(factors=factors)

        news = particles.each(learn)

        def heal(replica):
            # A sick particle starts from what travelled, with fresh slots.
            particles.heal(replica)
            return tf.identity(vectors[replica])

        def move(replica):
            position = tf.cond(
                mine[replica],
                lambda: tf.identity(positions[replica]),
                lambda: heal(replica),
            )
            if led:
                memory, finite = particles.rule_state[replica], led[1]
                position = self._rule.follow(memory, vectors[replica])
            else:
                position = self._rule.move(
                    particles.rule_state[replica],
                    position,
                    news[replica],
                    functools.partial(particles.tensor_ids, replica),
                )
                finite = divergence.is_finite(position)
            particles.keep(replica, vectors[replica])
            if replica == 0:
                measures.update(self._rule.measures(particles.state(0), news[0]))
            if self._delayed:
                position += ways[replica]
            particles.weights.unpack(replica, position)
            tf.cond(
                mine[replica],
                lambda: False,
                lambda: particles.restart_averages(replica),
            )
            return finite

        measures = {}
        return particles.each(move), measures

    @tf.function(autograph=False)
    def close(self, take_mean):
        """Puts all particles on one position and state.

        Args:
            take_mean: A bool, whether on the mean of their positions, and not on what
                the rule agreed on.

        Returns:
            Whether that position is finite, for each local particle; and whether any
            of all particles was in good health, `True` unless the mean is taken.
        """
        particles, any_healthy = self._particles, tf.constant(True)
        positions = particles.each(
            particles.weights.pack if take_mean else particles.agreed_position
        )
        # Nothing was averaged since the last synchronisation where the mean is taken.
        apart = particles.moved if take_mean else particles.left_apart
        states = particles.share(particles.each(apart.pack))
        if take_mean or apart.size:
            finite = [
                divergence.is_finite(position) & divergence.is_finite(state)
                for position, state in zip(positions, states)
            ]
            rows = [tf.cast([flag], tf.float64) for flag in finite]
            healthy = self._collectives.gather(rows)[:, 0] > 0
            positions, states = self._collectives.mean_of_both(
                positions, states, healthy
            )
            if take_mean:
                any_healthy = tf.reduce_any(healthy)

        def take(replica):
            particles.weights.unpack(replica, positions[replica])
            apart.unpack(replica, states[replica])
            return divergence.is_finite(positions[replica])

        return particles.each(take), any_healthy
