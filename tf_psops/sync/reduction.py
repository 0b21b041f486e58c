"""What travels between the workers at a synchronisation, and in which type."""

import tensorflow as tf

from tf_psops import _xla


class Reduction:
    """Lets one vector of the swarm travel, and the mean of what else is averaged.

    Args:
        collectives: The swarm's `Collectives`.
        particles: The local `Particles`.
        kind: "best" or "mean"; see `Rule.exchange`.
        payload: The `tf.DType` in which the one vector travels. What travels in
            another type than the vector's own is the way from `Particles.vector`,
            which is short.
    """

    def __init__(self, collectives, particles, kind, payload):
        self._collectives = collectives
        self._particles = particles
        self._kind = kind
        self._payload = payload
        self._shorten = _xla.compiled(
            lambda vector, last: tf.saturate_cast(vector - last, payload)
        )
        self._lengthen = _xla.compiled(
            lambda way, last: last + tf.cast(way, last.dtype)
        )

    @tf.function(autograph=False)
    def travel(self, offers, others, fitness, root, is_news):
        """Returns the vector that travels, and the mean of the other vectors.

        It must not read what training writes, which may go on meanwhile.

        Args:
            offers: A vector, [P], for each local particle.
            others: A vector, [Q], for each local particle; Q may be 0.
            fitness: [W], not finite for particles in bad health.
            root: Scalar int32, the particle with the best offer.
            is_news: Scalar bool, whether that offer has not travelled before.

        Returns:
            Two lists with a vector for each device.
        """
        mean = self._collectives.mean
        healthy = tf.math.is_finite(fitness)
        rounded = self._payload != self._particles.dtype
        if self._kind == "mean" and not rounded:
            return self._collectives.mean_of_both(offers, others, healthy)
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
            if not rounded:
                return self._collectives.broadcast(offers, root)
            ways = self._particles.each(way_of_root)
            return lengthen(self._collectives.broadcast(ways, root))

        def stay():
            return [tf.identity(vector) for vector in last]

        if self._kind == "best":
            return tf.cond(is_news, broadcast, stay), others
        ways = self._particles.each(way)
        return lengthen(mean(ways, healthy)), others
