"""What travels between the workers: a table of scalars and one flat vector.

The functions are for the inside of one `tf.function`, outside the replicas: they
take and give one tensor for each local device. Local replicas are joined on their
worker first, so that one vector travels for each worker, however many replicas it
has. All workers must call the same functions in the same order.

They go through the swarm's own `wire.Wire` where there is one, and else through
TensorFlow's collectives (NCCL, ring).
"""

import itertools

import tensorflow as tf

# Away from the keys that tf.distribute counts up from 1. All workers make their
# `Collectives` in the same order.
_group_keys = itertools.count(0x50530000)

# TensorFlow takes an instance key for one tensor shape only: each call has a range
# of its own.
_KEYS_PER_CALL = 1 << 26

_BUCKET_BYTES = 4 << 20


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
            call: A number from 0 to 31 that no other call of this object has.
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

    def mean(self, vectors, healthy, call, payload=None):
        """Returns the mean of the healthy replicas' vectors, [P], on each device.

        Args:
            vectors: A list of vectors, [P], one for each local replica. Those of
                replicas out of order may hold anything, NaN included.
            healthy: [W], a bool for each replica, at least one of them true.
            call: See `gather`.
            payload: The float `tf.DType` that travels; what is too large for it
                becomes its largest number. Defaults to that of the vectors.
        """
        first = self.first_particle
        with tf.device(self._devices[0]):
            # Not by `tf.where`, which would copy the vector.
            total = tf.add_n(
                [
                    tf.cond(
                        healthy[first + replica],
                        lambda vector=vector: tf.identity(vector),
                        lambda vector=vector: tf.zeros_like(vector),
                    )
                    for replica, vector in enumerate(vectors)
                ]
            )
            count = tf.cast(tf.math.count_nonzero(healthy), total.dtype)
            if self._wire:
                return self._to_devices(self._wire_mean(total, count, payload))
            share = total / count
            if payload:  # The sum must not be too large for it, either.
                limit = 0.99 * float(payload.max) / self._num_workers
                share = tf.clip_by_value(share, -limit, limit)
            # In one piece: the ring has its own, and pieces would wait for each other.
            mean = self._in_buckets(
                share, self._all_reduce, call, payload, share.shape[0]
            )
        return self._to_devices(mean)

    def broadcast(self, vectors, root, call, payload=None):
        """Returns replica `root`'s vector, [P], on each local device.

        Args:
            vectors: A list of vectors, [P], one for each local replica.
            root: Scalar int32, from 0 to W - 1, the same on all workers.
            call: See `gather`.
            payload: See `mean`.
        """
        root_worker = root // len(vectors)
        with tf.device(self._devices[0]):
            mine = tf.switch_case(
                root % len(vectors),
                [lambda vector=vector: tf.identity(vector) for vector in vectors],
            )
            if self._wire:
                mine = self._wire_broadcast(mine, root_worker, payload)
                return self._to_devices(mine)

            # An instance key that serves two roots gives uninitialised memory.
            def receive(piece, key):
                return self._receive(piece, key + root_worker)

            def send(piece, key):
                return self._send(piece, key + self._worker_index)

            mine = tf.cond(
                root_worker == self._worker_index,
                lambda: self._in_buckets(mine, send, call, payload),
                lambda: self._in_buckets(mine, receive, call, payload),
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

    def _wire_mean(self, total, count, payload):
        """Every worker makes the mean of its share, which then goes to all."""
        payload = payload or total.dtype
        local = len(self._devices)
        if local > 1:  # The sum of some may be too large for the payload.
            total, count = total / local, count / local
        shares = tf.numpy_function(
            self._wire.scatter,
            [_rounded(total, payload)],
            [payload] * self._num_workers,
        )
        share = tf.add_n([tf.cast(share, total.dtype) for share in shares]) / count
        mean = tf.numpy_function(
            self._wire.gather,
            [_rounded(share, payload), tf.size(total)],
            payload,
        )
        return tf.cast(tf.ensure_shape(mean, total.shape), total.dtype)

    def _wire_broadcast(self, vector, root, payload):
        payload = payload or vector.dtype
        got = tf.numpy_function(
            self._wire.broadcast,
            [_rounded(vector, payload), root],
            payload,
        )
        return tf.cast(tf.ensure_shape(got, vector.shape), vector.dtype)

    def _in_buckets(self, vector, transfer, call, payload, size=None):
        """Applies `transfer(piece, key)` to pieces of `size`, or of about 4 MB.

        A swarm in one process rounds as one over several workers does.
        """
        payload = payload or vector.dtype
        if self._num_workers == 1:
            return tf.cast(_rounded(vector, payload), vector.dtype)
        size = size or _BUCKET_BYTES // payload.size
        first_key = call * _KEYS_PER_CALL
        pieces = [
            tf.cast(
                transfer(
                    _rounded(vector[start : start + size], payload),
                    first_key + n * self._num_workers,
                ),
                vector.dtype,
            )
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
    row = tf.constant(row, tf.float64)
    return tf.function(lambda: group.gather([row], 0))().numpy()


def _rounded(vector, payload):
    # TensorFlow's would also copy what has the type already.
    return vector if vector.dtype == payload else tf.saturate_cast(vector, payload)


def _as_bits(piece):
    # TensorFlow broadcasts no bfloat16; its bits can travel as another type.
    return tf.bitcast(piece, tf.float16) if piece.dtype == tf.bfloat16 else piece
