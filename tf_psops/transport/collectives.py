"""What travels between the workers: a table of scalars and one flat vector.

All functions but `tell` are for the inside of one `tf.function`, outside the replicas:
they take and give one tensor for each local device. Local replicas are joined on their
worker first, so that one vector travels for each worker, however many replicas it
has. All workers must call the same functions in the same order.

They go through the swarm's own `wire.Wire` where there is one, and else through
TensorFlow's collectives (NCCL, ring).
"""

import enum
import itertools

import numpy as np
import tensorflow as tf

from tf_psops import _xla

# Away from the keys that tf.distribute counts up from 1. All workers make their
# `Collectives` in the same order.
_group_keys = itertools.count(0x50530000)

# TensorFlow takes an instance key for one tensor shape only: each call has a range
# of its own.
_KEYS_PER_CALL = 1 << 26

_BUCKET_BYTES = 4 << 20


class Call(enum.IntEnum):
    """Which of a synchronisation's calls of `Collectives` it is, 0 to 31."""

    BEGIN = enum.auto()
    TELL = enum.auto()
    REPORT = enum.auto()
    EXCHANGE = enum.auto()
    AVERAGE = enum.auto()
    HEALTH = enum.auto()
    CLOSE = enum.auto()


class Collectives:
    """Joins the tensors of all replicas of a swarm.

    Args:
        devices: The local devices, one for each replica of this worker.
        num_workers: The number of workers in the cluster.
        worker_index: The place of this worker, from 0.
        options: A `tf.distribute.experimental.CommunicationOptions`.
        wire: A `wire.Wire`, or `None` for TensorFlow's collectives.
    """

    def __init__(self, devices, num_workers, worker_index, options, wire=None):
        self._devices = tuple(devices)
        self._num_workers = num_workers
        self._worker_index = worker_index
        self._wire = wire
        # TensorFlow's own casts from and to two bytes take two to three times as long.
        self._sum_of_shares = _xla.compiled(_scaled_sum)
        self._group = {
            "group_size": num_workers,
            "group_key": next(_group_keys),
            "communication_hint": options.implementation.value.lower(),
            "timeout_seconds": options.timeout_seconds or 0.0,
        }

    @property
    def num_particles(self):
        """Returns W, the number of replicas on all workers."""
        return self._num_workers * len(self._devices)

    def gather(self, rows, call):
        """Returns a table of all replicas' rows, [W, K], in the particles' order.

        Args:
            rows: A list of vectors, [K], one for each local replica.
            call: A `Call` that no other place in the code gives this object.
        """
        with tf.device(self._devices[0]):
            table = tf.stack([tf.identity(row) for row in rows])
            if self._num_workers == 1:
                return table
            if self._wire:
                told = tf.numpy_function(
                    self._wire.tell, [tf.reshape(table, [-1])], table.dtype
                )
                return tf.reshape(told, [self.num_particles, table.shape[1]])
            # The order in which TensorFlow ranks the workers is its own affair.
            places = self.first_particle + tf.range(len(rows))
            labelled = tf.concat(
                [tf.cast(places, table.dtype)[:, tf.newaxis], table], axis=1
            )
            gathered = tf.raw_ops.CollectiveGatherV2(
                input=labelled,
                instance_key=call * _KEYS_PER_CALL,
                ordering_token=[],
                **self._group,
            )
            return tf.gather(gathered[:, 1:], tf.argsort(gathered[:, 0]))

    def tell(self, rows, call):
        """Returns what `gather` does, a NumPy array, outside of a `tf.function`."""
        if self._wire:
            told = self._wire.tell(np.concatenate(rows))
            return told.reshape(self.num_particles, -1)
        return self._tell(rows, call).numpy()

    @tf.function(autograph=False)
    def _tell(self, rows, call):
        return self.gather(rows, call)

    def mean(self, vectors, healthy, call):
        """Returns the mean of the healthy replicas' vectors, [P], on each device.

        Sums are of float32 at least; what is too large for a smaller type becomes its
        largest number.

        Args:
            vectors: A list of vectors, [P], one for each local replica. Those of
                replicas out of order may hold anything, NaN included.
            healthy: [W], a bool for each replica, at least one of them true.
            call: See `gather`.
        """
        first, local = self.first_particle, len(vectors)
        with tf.device(self._devices[0]):
            # Not by `tf.where`, which would copy the vector.
            vectors = [
                tf.cond(
                    healthy[first + replica],
                    lambda vector=vector: tf.identity(vector),
                    lambda vector=vector: tf.zeros_like(vector),
                )
                for replica, vector in enumerate(vectors)
            ]
            count = tf.math.count_nonzero(healthy)
            if self._num_workers == 1:
                mean = _scaled_sum(vectors, 1 / count)
            elif self._wire:
                # The sum of several may be too large for their type.
                mine = vectors[0] if local == 1 else _scaled_sum(vectors, 1 / local)
                mean = self._wire_mean(mine, local / count)
            else:
                mine = _scaled_sum(vectors, 1 / count)
                if mine.dtype.size == 2:  # Nor may the sum be too large.
                    limit = 0.99 * float(mine.dtype.max) / self._num_workers
                    mine = tf.clip_by_value(mine, -limit, limit)
                # In one piece: the ring has its own, which would wait for each other.
                mean = self._in_buckets(mine, self._all_reduce, call, mine.shape[0])
        return self._to_devices(mean)

    def mean_of_both(self, vectors, others, healthy, call):
        """Returns the means of two lists of vectors, which travel as one."""
        if not others[0].shape[0]:
            return self.mean(vectors, healthy, call), others
        both = [tf.concat(pair, axis=0) for pair in zip(vectors, others)]
        means = self.mean(both, healthy, call)
        size = vectors[0].shape[0]
        return [mean[:size] for mean in means], [mean[size:] for mean in means]

    def broadcast(self, vectors, root, call):
        """Returns replica `root`'s vector, [P], on each local device.

        Args:
            vectors: A list of vectors, [P], one for each local replica.
            root: Scalar int32, from 0 to W - 1, the same on all workers.
            call: See `gather`.
        """
        root_worker = root // len(vectors)
        with tf.device(self._devices[0]):
            mine = tf.switch_case(
                root % len(vectors),
                [lambda vector=vector: tf.identity(vector) for vector in vectors],
            )
            if self._num_workers == 1:
                return self._to_devices(mine)
            if self._wire:
                return self._to_devices(self._wire_broadcast(mine, root_worker))

            # An instance key that serves two roots gives uninitialised memory.
            def receive(piece, key):
                return self._receive(piece, key + root_worker)

            def send(piece, key):
                return self._send(piece, key + self._worker_index)

            mine = tf.cond(
                root_worker == self._worker_index,
                lambda: self._in_buckets(mine, send, call),
                lambda: self._in_buckets(mine, receive, call),
            )
        return self._to_devices(mine)

    @property
    def first_particle(self):
        """Returns the index of this worker's first replica in the swarm."""
        return self._worker_index * len(self._devices)

    def _to_devices(self, vector):
        copies = []
        for device in self._devices:
            with tf.device(device):
                copies.append(tf.identity(vector))
        return copies

    def _wire_mean(self, vector, scale):
        """Every worker sums its share of the vectors up, which then goes to all."""
        size, dtype = vector.shape[0], vector.dtype
        rows = [self._num_workers - 1, self._wire.share_length(size)]
        shares = tf.numpy_function(
            self._wire.scatter,
            [vector, _memory(rows, dtype)],
            [dtype] * self._num_workers,
        )
        share = self._sum_of_shares(shares, scale)
        mean = tf.numpy_function(
            self._wire.gather, [share, _memory([size], dtype)], dtype
        )
        return tf.ensure_shape(mean, vector.shape)

    def _wire_broadcast(self, vector, root):
        size, dtype = vector.shape[0], vector.dtype
        needed = tf.where(root == self._worker_index, 0, size)
        got = tf.numpy_function(
            self._wire.broadcast, [vector, root, _memory([needed], dtype)], dtype
        )
        return tf.ensure_shape(got, vector.shape)

    def _in_buckets(self, vector, transfer, call, size=None):
        """Applies `transfer(piece, key)` to pieces of `size`, or of about 4 MB."""
        size = size or _BUCKET_BYTES // vector.dtype.size
        first_key = call * _KEYS_PER_CALL
        pieces = [
            transfer(vector[start : start + size], first_key + n * self._num_workers)
            for n, start in enumerate(range(0, vector.shape[0], size))
        ]
        return tf.concat(pieces, axis=0)

    def _all_reduce(self, piece, key):
        return tf.raw_ops.CollectiveReduceV2(
            input=piece,
            instance_key=key,
            ordering_token=[],
            merge_op="Add",
            final_op="Id",
            max_subdivs_per_device=0,
            **self._group,
        )

    def _send(self, piece, key):
        sent = tf.raw_ops.CollectiveBcastSendV2(
            input=_as_bits(piece), instance_key=key, **self._group
        )
        return tf.bitcast(sent, piece.dtype)

    def _receive(self, piece, key):
        bits = _as_bits(piece)
        got = tf.raw_ops.CollectiveBcastRecvV2(
            instance_key=key, shape=tf.shape(bits), T=bits.dtype, **self._group
        )
        return tf.bitcast(got, piece.dtype)


def tell(strategy, row, timeout=0):
    """Returns what every worker tells, a NumPy array [num_workers, K] of float64.

    All workers must call it at the same time. It uses TensorFlow's collectives.

    Args:
        strategy: A `SwarmStrategy`.
        row: K numbers.
        timeout: Seconds to wait for the others, for which TensorFlow keeps a thread.
            Defaults to 0: that of `communication_options`.
    """
    options = strategy.communication_options
    if timeout:
        options = tf.distribute.experimental.CommunicationOptions(
            implementation=options.implementation, timeout_seconds=timeout
        )
    group = Collectives(
        strategy.extended.worker_devices[:1],
        strategy.num_workers,
        strategy.worker_index,
        options,
    )
    return group.tell([np.array(row, float)], Call.TELL)


def _scaled_sum(vectors, scale):
    """Returns scale * sum(vectors), of their type, added up in float32 at least."""
    dtype = vectors[0].dtype
    exact = dtype if dtype.size > 2 else tf.float32
    total = tf.add_n([tf.cast(vector, exact) for vector in vectors])
    total *= tf.cast(scale, exact)
    return total if dtype == exact else tf.saturate_cast(total, dtype)


def _memory(shape, dtype):
    """Returns a tensor for a `numpy_function` to fill in place and return.

    That hands over the memory of tensors as it is. TensorFlow uses its own again; the
    system would clear new one.
    """
    return tf.raw_ops.Empty(shape=shape, dtype=dtype)


def _as_bits(piece):
    # TensorFlow broadcasts no bfloat16; its bits can travel as another type.
    return tf.bitcast(piece, tf.float16) if piece.dtype == tf.bfloat16 else piece
