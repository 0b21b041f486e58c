"""The private half of a `SwarmStrategy`: TensorFlow's `StrategyExtended`.

`CollectiveAllReduceExtended` holds the per-device variables and the input pipeline of
`MultiWorkerMirroredStrategy`. Keras 3 takes a path that fails for instances of the
public class (keras issue 20585), so the public class cannot be the base. It is made
with an empty cluster, so that no TensorFlow server starts: each worker is a cluster of
its own to TensorFlow, and `transport` joins them.

`input_util.get_distributed_dataset` shares rows out to the workers for
`experimental_distribute_dataset`, which would hand them to several local CPUs by an
iterator that may crash. `distribute.compute_batch_size` and `values.PerReplica` serve
for the way without it.

`CollectiveReplicaLauncher` makes TensorFlow's collectives. See `_keys_of_traces`.
"""

import contextlib
import contextvars
import itertools
import weakref

import keras
import tensorflow as tf
from absl import logging
from tensorflow.python.data.experimental.ops import distribute
from tensorflow.python.distribute import (
    collective_all_reduce_strategy,
    cross_device_ops,
    cross_device_utils,
    input_util,
    values,
)

from tf_psops.batches import local_batches
from tf_psops.tensorflow_internals import swarm_variable, user_data

# Group keys of its own for every strategy: TensorFlow takes a key for one number of
# replicas only, and ends all collectives of the process where two strategies share
# one. All workers make their strategies in the same order.
_collective_key_bases = itertools.count(0, 1000)

# Whether a data set is to give all rows to every worker, and not a share to each.
every_row = contextvars.ContextVar("every_row", default=False)

# Whether this replica's gradients are those of its whole particle already.
gradients_reduced = contextvars.ContextVar("reduced", default=False)


@contextlib.contextmanager
def _without_infos():
    """Hides that the base class takes itself for a MirroredStrategy of one worker."""

    def is_shown(record):
        return record.levelno > logging.converter.STANDARD_INFO

    tf.get_logger().addFilter(is_shown)
    try:
        yield
    finally:
        tf.get_logger().removeFilter(is_shown)


class SwarmExtended(collective_all_reduce_strategy.CollectiveAllReduceExtended):
    """Replicas that share a cluster and start equal, and then train apart."""

    def __init__(
        self, strategy, devices, cluster_resolver, num_workers, index, share_gradients
    ):
        self._swarm_devices = devices
        self._swarm_resolver = cluster_resolver
        self._share_gradients = share_gradients
        self._shared_out = weakref.WeakSet()  # Data sets that are shared out already.
        self._new_variables = []
        self._made = []
        self._plain = False
        # The base class asks its strategy for it.
        strategy._collective_key_base = next(_collective_key_bases)
        resolvers, options = tf.distribute.cluster_resolver, tf.distribute.experimental
        with _without_infos():
            super().__init__(
                strategy,
                resolvers.SimpleClusterResolver(tf.train.ClusterSpec({})),
                options.CommunicationOptions(),
            )
        # From here on the base class counts all workers' replicas and shares inputs
        # out; what would be a collective between workers is overridden below.
        self._num_workers, self._id_in_cluster = num_workers, index

    # Called while `__init__` of the base class sets up the cluster.

    def _initialize_local_devices(self, cluster_resolver, worker_device):
        """Takes the caller's devices, or those that the caller's resolver grants."""
        if not self._swarm_devices:
            resolver = self._swarm_resolver
            if resolver is None:
                resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
            return super()._initialize_local_devices(resolver, worker_device)
        specs = [tf.DeviceSpec.from_string(device) for device in self._swarm_devices]
        device_type = specs[0].device_type
        devices = tuple(
            f"{worker_device}/device:{spec.device_type}:{spec.device_index}"
            for spec in specs
        )
        return devices, device_type

    # Variables: one of its own for every replica.

    def _create_variable(self, next_creator, **kwargs):
        """Gives every replica its own copy where the base class would mirror one.

        Writes stay on their replica, and a read outside the replicas takes the
        first local copy without a collective, so that what only the chief does
        (saving, say) cannot wait for a peer.
        """
        if self._plain:
            return next_creator(**kwargs)
        synchronization = kwargs.get("synchronization")
        if synchronization is not tf.VariableSynchronization.ON_READ:
            kwargs["synchronization"] = tf.VariableSynchronization.ON_READ
            kwargs["aggregation"] = tf.VariableAggregation.ONLY_FIRST_REPLICA
        with swarm_variable.outside_of_graphs(kwargs):
            variable = super()._create_variable(next_creator, **kwargs)
        # No argument of the base class says which class to take.
        variable.__class__ = swarm_variable.SwarmVariable
        variable.watchers = weakref.WeakSet()
        self._new_variables.append(variable)
        self._made.append(weakref.ref(variable))
        if tf.executing_eagerly() and not tf.distribute.in_cross_replica_context():
            # Else the step that makes it would have trained it when the scope ends.
            self._container_strategy().share_new_variables()
        return variable

    def take_new_variables(self):
        """Returns the variables made since the last call."""
        made, self._new_variables = self._new_variables, []
        return made

    def variables(self):
        """Returns all variables that were made in the strategy's scope, in order."""
        self._made = [made for made in self._made if made() is not None]
        return [variable for made in self._made if (variable := made()) is not None]

    @contextlib.contextmanager
    def plain_variables(self):
        """Lets variables be what they are outside of the scope, and no part of it."""
        before, self._plain = self._plain, True
        try:
            yield
        finally:
            self._plain = before

    def _reduce_to(self, reduce_op, value, destinations, options):
        """Reduces over the local devices, and then over the workers."""
        if not isinstance(value, values.DistributedValues):
            return cross_device_ops.reduce_non_distributed_value(
                reduce_op, value, destinations, self._num_replicas_in_sync
            )
        copies = value.values
        with tf.device(self.worker_devices[0]):
            local = tf.add_n([tf.convert_to_tensor(copy) for copy in copies])
        mean = reduce_op == tf.distribute.ReduceOp.MEAN
        if mean:
            local /= tf.cast(len(copies), local.dtype)
        strategy = self._container_strategy()
        if strategy.peers is None:
            return local
        with strategy.barrier("a metric of the whole swarm"):
            flat = strategy.collectives.reduce(tf.reshape(local, [-1]), mean)
        return tf.reshape(flat, local.shape)

    def _gather_to_implementation(self, value, destinations, axis, options):
        """Joins the values of the local devices, and then of the workers, in order."""
        copies = getattr(value, "values", (value,))
        with tf.device(self.worker_devices[0]):
            local = tf.concat([tf.convert_to_tensor(copy) for copy in copies], axis)
        strategy = self._container_strategy()
        if strategy.peers is None:
            return local
        with strategy.barrier("a gathering of all replicas' values"):
            return strategy.collectives.concat(local, axis)

    # Gradients: what one replica reduces reaches only that replica.

    def _use_merge_call(self):
        """Keeps updates inside their replica.

        With merge calls Keras' optimizers reduce gradients through
        `batch_reduce_to`, and the weights stay silently in step on CPUs.
        """
        return False

    @property
    def replicas_per_particle(self):
        """Returns how many replicas share gradients, and so train as one particle."""
        if self._share_gradients:
            return self._num_replicas_in_sync
        return self._container_strategy().local_replicas_per_particle

    @property
    def supports_jit(self):
        """Tells whether XLA can compile the steps of a model."""
        alone = not (self._share_gradients and self._num_workers > 1)
        return alone and len(self.worker_devices) == 1

    def _replica_ctx_all_reduce(self, reduce_op, value, options=None):
        """Reduces over the replicas of one particle: over one, no collective runs."""
        if self.replicas_per_particle == 1 or gradients_reduced.get():
            return value
        if len(self.worker_devices) > 1:
            with _keys_of_traces():
                value = super()._replica_ctx_all_reduce(reduce_op, value, options)
        if not (self._share_gradients and self._container_strategy().peers):
            return value
        mean = reduce_op == tf.distribute.ReduceOp.MEAN

        def reduce(strategy, values):
            # All local replicas have the same by now: one of them asks the others.
            values = strategy.experimental_local_results(values)[0]
            return self._reduce_as_one(values, mean)

        if len(self.worker_devices) == 1:
            return self._reduce_as_one(value, mean)
        return tf.distribute.get_replica_context().merge_call(reduce, args=(value,))

    def _reduce_as_one(self, values, mean):
        """Sums tensors over the workers, all of one type in one vector."""
        collectives = self._container_strategy().collectives
        flat = [tf.convert_to_tensor(value) for value in tf.nest.flatten(values)]
        reduced = list(flat)
        for dtype in dict.fromkeys(value.dtype for value in flat):
            places = [i for i, value in enumerate(flat) if value.dtype == dtype]
            parts = [tf.reshape(flat[i], [-1]) for i in places]
            total = collectives.reduce(tf.concat(parts, axis=0), mean)
            sizes = [tf.size(part) for part in parts]
            for i, part in zip(places, tf.split(total, sizes, num=len(places))):
                reduced[i] = tf.reshape(part, tf.shape(flat[i]))
        return tf.nest.pack_sequence_as(values, reduced)

    # Initial values: the chief's, but a random stream of its own for every replica.

    def _get_variable_creator_initial_value(
        self, replica_id, device, primary_var, **kwargs
    ):
        """Gives a worker's replicas one value; see `transport.initial_values`.

        And moves Keras' random seeds apart, so that dropout masks differ.
        """
        if replica_id:
            initial_value = super()._get_variable_creator_initial_value(
                replica_id=replica_id, device=device, primary_var=primary_var, **kwargs
            )
        else:
            # The base class would ask the other workers, over TensorFlow.
            def initial_value():
                value = kwargs["initial_value"]
                value = value() if callable(value) else value
                value = getattr(value, "wrapped_value", value)  # Of a checkpoint.
                return tf.convert_to_tensor(value, kwargs.get("dtype"))

        if not swarm_variable.is_seed(kwargs.get("name") or ""):
            return initial_value
        # Later replicas copy the worker's first one, which has moved already.
        places = replica_id or self._id_in_cluster * len(self.worker_devices)
        return lambda: swarm_variable.move_seed(initial_value(), places)

    # Inputs: every worker goes on for as long as its own data lasts.

    def _in_multi_worker_mode(self):
        """Keeps the input pipeline from a collective at every step.

        The base class asks all workers before each batch whether anyone still
        has data. `num_workers` tells whether there are peers.
        """
        return False

    def _experimental_distribute_dataset(self, dataset, options):
        """Shares the rows out to the workers, and there to the local devices.

        Between several CPU devices without the base class' iterator: its thread may
        read a data set that has been freed, and a new one is slow to begin.
        """
        if dataset in self._shared_out:
            return dataset
        per_replica = tf.distribute.InputReplicationMode.PER_REPLICA
        if options and options.experimental_replication_mode is per_replica:
            return super()._experimental_distribute_dataset(dataset, options)
        num_devices = len(self.worker_devices)
        num_workers = 1 if every_row.get() else self._num_workers
        if num_workers * num_devices > 1:
            local_batches.check(dataset, num_workers * num_devices)
            dataset = user_data.copied(dataset)
        if num_workers > 1:
            shares = self._share(dataset, num_workers, self._id_in_cluster, num_workers)
            (dataset,) = shares._cloned_datasets
            self._shared_out.add(dataset)
        if self._local_device_type != "CPU":
            return self._share(dataset, 1, 0, num_devices, options)
        if num_devices > 1:
            full_size = int(distribute.compute_batch_size(dataset))
            dataset = local_batches.split(
                dataset, full_size, num_devices, values.PerReplica
            )
            self._shared_out.add(dataset)
        return dataset

    def _share(self, dataset, num_workers, index, num_shares, options=None):
        """Splits batches into shares, of which a worker gets as many as any other."""
        return input_util.get_distributed_dataset(
            dataset,
            self._input_workers_with_options(options),
            self._container_strategy(),
            num_replicas_in_sync=num_shares,
            input_context=tf.distribute.InputContext(num_workers, index, num_shares),
            options=options,
        )

    def split(self, value):
        """Returns a value's rows, split over the local devices."""
        value = keras.ops.convert_to_tensor(value)
        num_devices = len(self.worker_devices)
        parts = local_batches.parts(value, int(value.shape[0]), num_devices)
        return values.PerReplica(parts)

    def _distribute_datasets_from_function(self, dataset_fn, options):
        """Hands each worker's batches to its devices in turns.

        Also without the base class' iterator for several CPU devices.
        """
        if self._local_device_type != "CPU" or options:
            return super()._distribute_datasets_from_function(dataset_fn, options)
        dataset = dataset_fn(self._make_input_context())
        num_devices = len(self.worker_devices)
        if num_devices > 1:
            dataset = local_batches.take_turns(dataset, num_devices, values.PerReplica)
        self._shared_out.add(dataset)
        return dataset

    @property
    def num_workers(self):
        return self._num_workers

    @property
    def worker_index(self):
        return self._id_in_cluster


def of(strategy):
    """Returns the `SwarmExtended` of a strategy, `None` if it has another one."""
    extended = strategy.extended
    return extended if isinstance(extended, SwarmExtended) else None


def of_replica():
    """Returns that of the replica that asks, `None` outside of a swarm's replicas."""
    replica = tf.distribute.get_replica_context()
    return replica and of(replica.strategy)


@contextlib.contextmanager
def _keys_of_traces():
    """Lets collectives in a loop of a graph have the keys that they are traced with.

    TensorFlow takes new ones at each call, but its control flow cannot hand them on to
    a function in a loop, such as Keras has for `steps_per_execution`. With one key, all
    calls have to have tensors of the same shape.
    """
    launcher = cross_device_utils.CollectiveReplicaLauncher
    before = launcher._prefer_unique_instance_key
    launcher._prefer_unique_instance_key = before and not _is_in_loop()
    try:
        yield
    finally:
        launcher._prefer_unique_instance_key = before


def _is_in_loop():
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    while graph is not None:
        if getattr(graph, "is_control_flow_graph", False):
            return True
        graph = getattr(graph, "outer_graph", None)
    return False
