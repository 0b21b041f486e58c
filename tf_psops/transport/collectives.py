"""What travels between the particles: a table of scalars and one flat vector.

Every worker reduces over its local replicas by itself, so that one vector leaves a
worker. It travels through the memory of the host: particles on GPUs cost a copy to the
host and one back.
"""

import contextlib

import numpy as np
import tensorflow as tf

from tf_psops import _zeros


class Collectives:
    """Gathers rows and moves vectors between the replicas of a swarm.

    All workers must call the same functions in the same order.

    Args:
        devices: The local devices, in the order of the replicas.
        group: The `group.Group` of the workers, `None` for a swarm in one process.
        replicas_per_particle: How many local replicas make one particle, 1 or all. The
            first one speaks for the others, which have the same.
    """

    def __init__(self, devices, group, replicas_per_particle=1):
        self._devices = tuple(devices)
        self._group = group
        self._local = len(self._devices) // replicas_per_particle

    @property
    def num_particles(self):
        """Returns W, the number of particles on all workers, there or not."""
        return (self._group.num_workers if self._group else 1) * self._local

    @property
    def first_particle(self):
        """Returns the index of this worker's first particle in the swarm."""
        return self._group.index * self._local if self._group else 0

    def gather(self, rows):
        """Returns a table of all replicas' rows, [W, K], in the particles' order.

        Args:
            rows: A list of vectors, [K], one for each local replica. Rows of workers
                that are not there are NaN.
        """
        with tf.device(self._devices[0]):
            table = tf.stack([tf.identity(row) for row in rows[: self._local]])
        if not self._group:
            return table
        with tf.device("CPU:0"):
            told = tf.numpy_function(self._table, [table], table.dtype)
            return tf.ensure_shape(told, [self.num_particles, table.shape[1]])

    def tell(self, rows):
        """Returns what `gather` does, of and as NumPy arrays."""
        rows = np.stack(rows[: self._local])
        return self._table(rows) if self._group else rows

    def _table(self, rows):
        tables = self._group.gather(rows.ravel())
        absent = np.full(rows.size, np.nan, rows.dtype)
        flat = np.concatenate([absent if t is None else t for t in tables])
        return flat.reshape(self.num_particles, -1)

    @property
    def leads_shares(self):
        """Returns whether each of several workers has a share of what it reduces."""
        # On GPUs the whole vector is led in less time than a share is copied.
        device = tf.DeviceSpec.from_string(self._devices[0])
        return self._group is not None and device.device_type == "CPU"

    def share(self, size):
        """Returns the start and the end of this worker's share of a vector."""
        share = self._group.share(size)
        return share.start, share.stop

    def mean(self, vectors, healthy, lead=None):
        """Returns the mean of the healthy replicas' vectors, [P], on each device.

        Sums are of float32 at least; what is too large for a smaller type becomes its
        largest number.

        Args:
            vectors: A list of vectors, [P], one for each local replica. Those of
                replicas out of order may hold anything, NaN included.
            healthy: [W], a bool for each replica, at least one of them true.
            lead: A function of a vector with the mean in this worker's `share`, and
                anything elsewhere, that changes it there and returns
                `gather_shares` of it. Only where `leads_shares`, in `together`.
        """
        first, local = self.first_particle, self._local
        with tf.device(self._devices[0]):
            # Not by `tf.where`, which would copy the vector.
            vectors = [
                tf.cond(
                    healthy[first + replica],
                    lambda vector=vector: tf.identity(vector),
                    lambda vector=vector: _zeros.like(vector),
                )
                for replica, vector in enumerate(vectors[:local])
            ]
            if not self._group:
                count = tf.math.count_nonzero(healthy)
                return self._to_devices(_scaled_sum(vectors, 1 / count))
            # The sum of several may be too large for their type.
            mine = vectors[0] if local == 1 else _scaled_sum(vectors, 1 / local)
        local_healthy = tf.reshape(healthy, [self._group.num_workers, local])
        if lead:
            mean = lead(self._reduce(self._group.reduce_scatter, mine, local_healthy))
        else:
            mean = self._reduce(self._group.all_reduce, mine, local_healthy)
        return self._to_devices(mean)

    def gather_shares(self, vector):
        """Returns a NumPy array with the shares of all workers in their places.

        Args:
            vector: The same array, with this worker's.
        """
        return vector if self._group.is_alone else self._group.all_gather(vector)

    def add_up(self, sums):
        """Returns the totals of all workers' scalars, lists of float64."""

        def total(sums):
            told = self._group.gather(sums)
            return np.sum([one for one in told if one is not None], axis=0)

        with tf.device("CPU:0"):
            totals = tf.numpy_function(total, [tf.stack(sums)], tf.float64)
            return tf.unstack(tf.ensure_shape(totals, [len(sums)]))

    def reduce(self, vector, mean):
        """Returns the sum, or the mean, of one vector, [P], of each worker.

        Args:
            vector: This worker's vector.
            mean: Whether to return the mean.
        """
        if not self._group:
            return vector
        # No particles, to divide by their number.
        local = int(mean)
        all_healthy = tf.ones([self._group.num_workers, local], bool)
        return self._reduce(self._group.all_reduce, vector, all_healthy)

    def concat(self, tensor, axis):
        """Returns one tensor of each worker that is there, joined along an axis.

        Args:
            tensor: This worker's, of the same shape as the others'.
            axis: The axis.
        """

        def work(mine):
            told = self._group.gather(mine.ravel())
            parts = [part.reshape(mine.shape) for part in told if part is not None]
            return np.concatenate(parts, axis)

        with tf.device("CPU:0"):
            return tf.numpy_function(work, [tensor], tensor.dtype)

    def _reduce(self, function, vector, healthy):
        """Returns what the group's `all_reduce` or `reduce_scatter` makes of a mean."""

        def work(vector, healthy, memory):
            if self._group.is_alone:
                memory[...] = vector
                return memory

            def reduce(shares, own):
                count = healthy[list(self._group.present)].sum()
                scale = healthy.shape[1] / count if count else 1
                _scaled_sum_of_arrays(shares, scale, own)

            return self._group.transaction(lambda: function(vector, memory, reduce))

        with tf.device("CPU:0"):
            memory = _memory(tf.shape(vector), vector.dtype)
            mean = tf.numpy_function(work, [vector, healthy, memory], vector.dtype)
            return tf.ensure_shape(mean, vector.shape)

    def mean_of_both(self, vectors, others, healthy, lead=None):
        """Returns the `mean` of each of two lists of vectors, which travel as one."""
        if not others[0].shape[0]:
            return self.mean(vectors, healthy, lead), others
        both = [tf.concat(pair, axis=0) for pair in zip(vectors, others)]
        means = self.mean(both, healthy, lead)
        size = vectors[0].shape[0]
        return [mean[:size] for mean in means], [mean[size:] for mean in means]

    def broadcast(self, vectors, root):
        """Returns replica `root`'s vector, [P], on each local device.

        Args:
            vectors: A list of vectors, [P], one for each local replica.
            root: Scalar int32, from 0 to W - 1, the same on all workers.
        """
        with tf.device(self._devices[0]):
            mine = tf.switch_case(
                root % self._local,
                [
                    lambda vector=vector: tf.identity(vector)
                    for vector in vectors[: self._local]
                ],
            )
        if not self._group:
            return self._to_devices(mine)
        root_worker = root // self._local
        with tf.device("CPU:0"):
            needed = tf.where(root_worker == self._group.index, 0, mine.shape[0])
            got = tf.numpy_function(
                self._broadcast,
                [mine, root_worker, _memory([needed], mine.dtype)],
                mine.dtype,
            )
            return self._to_devices(tf.ensure_shape(got, mine.shape))

    def _broadcast(self, vector, root, memory):
        def work():
            # Where it is gone, all have had the same.
            there = self._group.present
            worker = int(root) if root in there else there[0]
            return self._group.broadcast(vector, worker, memory)

        return self._group.transaction(work)

    def together(self, work, admits=False):
        """Does something in common; see `group.Group.transaction`."""
        return self._group.transaction(work, admits) if self._group else work()

    def alone(self):
        """Lets collectives in a `with` block be of this worker's replicas alone."""
        return self._group.alone() if self._group else contextlib.nullcontext()

    def _to_devices(self, vector):
        copies = []
        for device in self._devices:
            with tf.device(device):
                copies.append(tf.identity(vector))
        return copies


def _scaled_sum(vectors, scale):
    """Returns scale * sum(vectors), of their type, added up in float32 at least."""
    dtype = vectors[0].dtype
    exact = dtype if dtype.size > 2 else tf.float32
    total = tf.add_n([tf.cast(vector, exact) for vector in vectors])
    total *= tf.cast(scale, exact)
    return total if dtype == exact else tf.saturate_cast(total, dtype)


def _scaled_sum_of_arrays(arrays, scale, out):
    """Writes scale * sum(arrays) to `out`, added up in float32 at least."""
    first, *others = arrays
    exact = out if out.itemsize > 2 else np.empty(out.shape, np.float32)
    # In the order of the workers, so that all add up alike.
    if others:
        np.add(first, others[0], out=exact, dtype=exact.dtype)
        for array in others[1:]:
            exact += array
    else:
        exact[...] = first
    if scale != 1:
        exact *= exact.dtype.type(scale)
    if exact is not out:
        largest = float(tf.as_dtype(out.dtype).max)
        out[...] = np.clip(exact, -largest, largest, out=exact)


def _memory(shape, dtype):
    """Returns a tensor for a `numpy_function` to fill in place and return.

    That hands over the memory of tensors as it is. TensorFlow uses its own again; the
    system would clear new one.
    """
    return tf.raw_ops.Empty(shape=shape, dtype=dtype)
