"""What travels between the workers at a synchronisation, and in which type."""

import operator

import numpy as np
import tensorflow as tf

from tf_psops import _traced, _xla

_PIECE = 1 << 15  # Elements, so that a piece stays in the cache.
# A shorter vector is moved in less time than a meeting on the way takes.
_LEAST_TO_SHARE = 1 << 20


class Reduction:
    """Lets one vector of the swarm travel, and the mean of what else is averaged.

    Args:
        collectives: The swarm's `Collectives`.
        particles: The local `Particles`.
        rule: A `CompiledRule`.
        payload: The `tf.DType` in which the one vector travels. What travels in
            another type than the vector's own is the way from `Particles.vector`,
            which is short.
    """

    def __init__(self, collectives, particles, rule, payload):
        self._collectives = collectives
        self._particles = particles
        self._rule = rule
        self._payload = payload
        self._is_exact = payload == particles.dtype
        self._leads_shares = (
            rule.is_shared
            and self._is_exact
            and collectives.leads_shares
            and particles.weights.size >= _LEAST_TO_SHARE
        )
        self._shorten = _xla.compiled(
            lambda vector, last: tf.saturate_cast(vector - last, payload)
        )
        self._lengthen = _xla.compiled(
            lambda way, last: last + tf.cast(way, last.dtype)
        )

    def travel(self, offers, others, news, root, is_news):
        """Returns the vector that travels, and the mean of the other vectors.

        It must not read what training writes, which may go on meanwhile.

        Args:
            offers: A vector, [P], for each local particle.
            others: A vector, [Q], for each local particle; Q may be 0.
            news: The `News` of all particles.
            root: Scalar int32, the particle with the best offer.
            is_news: Scalar bool, whether that offer has not travelled before.

        Returns:
            Two lists with a vector for each device; and where a `SharedRule` has led
            the vector on, each worker its share, the factors of it and whether this
            worker's share is finite, otherwise `None`.
        """
        share = None
        if self._leads_shares:
            size = offers[0].shape[0]
            share = self._collectives.share(size + others[0].shape[0])
            share = [min(end, size) for end in share]
        return self._travel(offers, others, news, root, is_news, share)

    @_traced.once
    def _travel(self, offers, others, news, root, is_news, share):
        mean = self._collectives.mean
        healthy = tf.math.is_finite(news.fitness)
        if self._rule.exchange == "mean" and self._is_exact:
            led = lead = None
            if share:

                def lead(mean):
                    nonlocal led
                    mean, *led = self._lead(mean, news, slice(*share))
                    return mean

            means = self._collectives.mean_of_both(offers, others, healthy, lead)
            return *means, led
        if others[0].shape[0]:
            others = mean(others, healthy)
        last = [vector.read_value() for vector in self._particles.vector]

        def way(replica):
            return self._shorten(offers[replica], last[replica])

        def way_of_root(replica):
            # Only the root's is sent: the others need the memory for it, no more.
            return tf.cond(
                root == self._particles.indices[self._particles.place(replica)],
                lambda: way(replica),
                lambda: tf.raw_ops.Empty(shape=last[0].shape, dtype=self._payload),
            )

        def lengthen(ways):
            return self._particles.each(lambda r: self._lengthen(ways[r], last[r]))

        def broadcast():
            if self._is_exact:
                return self._collectives.broadcast(offers, root)
            ways = self._particles.each(way_of_root)
            return lengthen(self._collectives.broadcast(ways, root))

        def stay():
            return [tf.identity(vector) for vector in last]

        if self._rule.exchange == "best":
            return tf.cond(is_news, broadcast, stay), others, None
        ways = self._particles.each(way)
        return lengthen(mean(ways, healthy)), others, None

    def _lead(self, mean, news, share):
        """Returns where the rule leads from the mean, its factors, and if it is finite.

        Args:
            mean: A vector with the mean in this worker's share.
            news: A `News`.
            share: The slice of the weights in that share.
        """
        particles = self._particles
        state = tf.nest.map_structure(operator.itemgetter(share), particles.state(0))
        factors = self._rule.factors(
            state,
            news._replace(vector=mean[share]),
            len(particles.weights.variables[0]),
            self._collectives.add_up,
        )
        known = state, factors

        def work(mean, *flat):
            state, factors = tf.nest.pack_sequence_as(known, flat)
            own, is_finite = mean[share], True
            for start in range(0, len(own), _PIECE):
                cut = operator.itemgetter(slice(start, start + _PIECE))
                self._rule.lead(tf.nest.map_structure(cut, state), cut(own), factors)
                is_finite = is_finite and np.isfinite(cut(own)).all()
            return self._collectives.gather_shares(mean), np.bool_(is_finite)

        with tf.device("CPU:0"):
            led, is_finite = tf.numpy_function(
                work, [mean, *tf.nest.flatten(known)], [mean.dtype, tf.bool]
            )
        is_finite = tf.ensure_shape(is_finite, [])
        return tf.ensure_shape(led, mean.shape), factors, is_finite
