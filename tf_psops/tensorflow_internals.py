"""The one module that touches the private API of TensorFlow and Keras.

It says which private names it uses, or what of Keras it replaces at run time, and why
no public one serves. All of it was checked against TensorFlow 2.19.1 with Keras 3.10
and 2.21.0 with Keras 3.15; `python -m tests.compatibility` runs the suite on both.

  * Variables of which each replica has a copy of its own. `values.SyncOnReadVariable`
    is TensorFlow's class of such a variable; the public API makes them, and names no
    class.

  * Data sets: what may hand out the user's memory, and what waits in vain when it ends.
    `Dataset._functions` and `Dataset._inputs` alone tell which data sets run Python
    code. `multi_device_iterator_ops._create_device_dataset` makes the data sets that
    hand batches to several local GPUs.

  * The private half of a `SwarmStrategy`: TensorFlow's `StrategyExtended`.
    `CollectiveAllReduceExtended` holds the per-device variables and the input pipeline
    of `MultiWorkerMirroredStrategy`. Keras 3 takes a path that fails for instances of
    the public class (keras issue 20585), so the public class cannot be the base. It is
    made with an empty cluster, so that no TensorFlow server starts: each worker is a
    cluster of its own to TensorFlow, and `transport` joins them.
    `input_util.get_distributed_dataset` shares rows out to the workers for
    `experimental_distribute_dataset`, which would hand them to several local CPUs by an
    iterator that may crash. `distribute.compute_batch_size` and `values.PerReplica`
    serve for the way without it. `CollectiveReplicaLauncher` makes TensorFlow's
    collectives. See `_keys_of_traces`.

  * Keras' trainer: what it draws, builds, compiles and reports of a model.
    `TensorFlowTrainer.predict` and `_maybe_symbolic_build` are where Keras decides
    which rows a model predicts, and draws a batch to build it;
    `_get_metrics_result_or_logs` where it decides what the history says. Its
    `jit_compile` knows what XLA cannot compile, but not of several devices. `fit` tells
    its callbacks nothing of an exception. `compile` ends what is known of a step.

  * Losses and gradients of replicas that share them. The `apply` of Keras' optimizers,
    `tf.GradientTape.gradient`, the `add_loss` of Keras' layers and the `update_state`
    of `keras.metrics.Mean` are public, but replaced, and so are `reduce_values` and
    `apply_mask` of `keras.src.losses.loss` and `CompileLoss.call`: Keras sums gradients
    after it has clipped, checked and accumulated them, and takes all replicas to have
    as many rows. `could_possibly_record` tells a loss that is trained on from one that
    is only reported. `_get_function` and `graph` give what a function of a graph
    computes.

  * Lets a replica that a batch leaves without rows train. All convolutions and
    max-pooling of Keras, by layers and by `keras.ops`, come to functions of
    `keras.src.backend.tensorflow.nn`, which are replaced, and so is the `call` of
    `keras.layers.BatchNormalization`.

  * The `fit` that is under way: its callbacks, where it begins, and who calls whom.
    Keras tells a callback neither of the others nor of the `fit` that runs it, but the
    stack does.

  * What a model consists of: its variables, optimizers and metrics, wherever they hang.
    `auto_control_deps_utils.get_read_write_resource_inputs` alone tells which variables
    a traced function writes, through all functions that it calls.

  * Calls of traced functions. `ConcreteFunction._call_flat` is what the public call
    does, without a check of each argument that takes longer than all the rest.
"""

import collections
import contextlib
import contextvars
import functools
import inspect
import itertools
import re
import types
import weakref

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from keras.src.backend.tensorflow import nn
from keras.src.backend.tensorflow import trainer as tensorflow_trainer
from keras.src.losses import loss as loss_lib
from keras.src.trainers import compile_utils
from keras.src.trainers import trainer as base_trainer
from tensorflow.python.data.experimental.ops import distribute
from tensorflow.python.data.ops import multi_device_iterator_ops
from tensorflow.python.distribute import (
    collective_all_reduce_strategy,
    cross_device_ops,
    cross_device_utils,
    input_util,
    values,
)
from tensorflow.python.eager import record
from tensorflow.python.framework import auto_control_deps_utils

from tf_psops.batches import local_batches, rows_of_replicas, sums_of_rows
from tf_psops.transport import membership

# Variables.

_SEED_STRIDE = 1_000_003


class SwarmVariable(values.SyncOnReadVariable):
    """A copy for each replica, with all that plain TensorFlow's variables can do.

    The base class refuses to write to single rows, as optimizers do with the sparse
    gradients of an embedding, and to be a Python number. And word goes out of what is
    set outside of the replicas, where a user's code, such as a callback, gives all
    local copies one value.

    Attributes:
        watchers: Objects whose `note_set(variable)` is called after that; held weakly.
    """

    def assign(self, *args, **kwargs):
        return self._told(super().assign(*args, **kwargs))

    def assign_add(self, *args, **kwargs):
        return self._told(super().assign_add(*args, **kwargs))

    def assign_sub(self, *args, **kwargs):
        return self._told(super().assign_sub(*args, **kwargs))

    def _told(self, result):
        replica = tf.distribute.get_replica_context()
        inside = replica is not None and replica.strategy is self.distribute_strategy
        if not inside and tf.executing_eagerly():
            for watcher in list(self.watchers):
                watcher.note_set(self)
        return result

    def __float__(self):
        return float(self.numpy())

    def __int__(self):
        return int(self.numpy())

    def __complex__(self):
        return complex(self.numpy())

    def __bool__(self):
        return bool(self.numpy())

    def __array__(self, dtype=None):
        return np.asarray(self.numpy(), dtype=dtype)


def _scattering(method):
    """Makes a method that writes to a replica's copy; outside of replicas to all."""

    def scatter(self, value, *args, **kwargs):
        def write(variable, value):
            return getattr(variable, method)(value, *args, **kwargs)

        return self._told(self._update(write, value))

    return scatter


for _method in (
    "scatter_add",
    "scatter_sub",
    "scatter_mul",
    "scatter_div",
    "scatter_min",
    "scatter_max",
    "scatter_update",
    "scatter_nd_add",
    "scatter_nd_sub",
    "scatter_nd_update",
    "batch_scatter_update",
):
    setattr(SwarmVariable, _method, _scattering(_method))


def is_seed(name):
    """Tells by its name whether a variable is the state of a random generator."""
    return "seed_generator_state" in name


def move_seed(seed, places):
    """Returns a random seed so many replicas further on."""
    offset = tf.constant([places * _SEED_STRIDE % 0x7FFFFFFF, 0], tf.int64)
    return tf.cast(tf.cast(seed, tf.int64) + offset, seed.dtype)


@contextlib.contextmanager
def _outside_of_graphs(arguments):
    """Makes a variable have its value at once, also while a function is traced.

    TensorFlow would set it when the function is first called, too late to be shared.

    Args:
        arguments: Those of the variable; a constant of the graph becomes an array.
    """
    value = arguments.get("initial_value")
    if tf.is_tensor(value) and tf.is_symbolic_tensor(value):
        value = tf.get_static_value(value)
        if value is None:  # It is computed in the graph.
            yield
            return
        arguments["initial_value"] = value
    with tf.init_scope():
        yield


# Data sets.


def _without_tuning(create_dataset):
    """Spares the end of each epoch a wait of up to a minute.

    tf.data's tuning thread is told of the end of an iterator before it can see that
    it has ended, and may sleep on for its whole period, which grows to 60 seconds.
    In these data sets there is nothing to tune: one fixed prefetch for each device.
    """

    @functools.wraps(create_dataset)
    def create(*args):
        options = tf.data.Options()
        options.autotune.enabled = False
        return create_dataset(*args).with_options(options)

    return create


multi_device_iterator_ops._create_device_dataset = _without_tuning(
    multi_device_iterator_ops._create_device_dataset
)


def _may_alias_arrays(dataset):
    """Returns whether a data set may hand out the memory of the user's arrays.

    What Python code returns becomes a tensor without a copy where NumPy's memory is
    aligned. TensorFlow keeps such a tensor as it is, but writes into parts of it.
    """
    for function in dataset._functions():
        graph = function.function.graph.as_graph_def()
        nodes = itertools.chain(
            graph.node, *(f.node_def for f in graph.library.function)
        )
        if any("PyFunc" in node.op for node in nodes):
            return True
    return any(map(_may_alias_arrays, dataset._inputs()))


def _copied(dataset):
    """Makes a data set hand out memory of its own where it may be the user's."""
    if not _may_alias_arrays(dataset):
        return dataset
    return local_batches.map_values(
        lambda value: tf.nest.map_structure(
            lambda tensor: tf.raw_ops.DeepCopy(x=tensor), value, expand_composites=True
        ),
        dataset,
    )


# The strategy.

# Group keys of its own for every strategy: TensorFlow takes a key for one number of
# replicas only, and ends all collectives of the process where two strategies share
# one. All workers make their strategies in the same order.
_collective_key_bases = itertools.count(0, 1000)

# Whether a data set is to give all rows to every worker, and not a share to each.
_every_row = contextvars.ContextVar("every_row", default=False)

# Whether this replica's gradients are those of its whole particle already.
_gradients_reduced = contextvars.ContextVar("reduced", default=False)


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
        with _outside_of_graphs(kwargs):
            variable = super()._create_variable(next_creator, **kwargs)
        # No argument of the base class says which class to take.
        variable.__class__ = SwarmVariable
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
        if self.replicas_per_particle == 1 or _gradients_reduced.get():
            return value
        rows = rows_of_replicas.current()
        if rows and rows.is_trial:
            return tf.nest.map_structure(_as_if_reduced, value)
        if len(self.worker_devices) > 1:
            _check_no_function_in_eager_step()
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

    def sum_over_replicas(self, value, over_workers):
        """Returns the sum of a scalar over all replicas of the swarm.

        Without `merge_call`, so that replicas may ask inside of functions, too.

        Args:
            value: What this replica has.
            over_workers: A function that makes of this worker's sum that of all
                workers, for one replica of each to call.
        """
        value = self._sum_here(value)
        if self._num_workers == 1:
            return value
        replica = tf.distribute.get_replica_context()
        place = tf.get_static_value(replica.replica_id_in_sync_group)
        is_first = place % len(self.worker_devices) == 0
        return self._sum_here(over_workers(value) if is_first else value * 0)

    def _sum_here(self, value):
        """Returns the sum over the local replicas."""
        if len(self.worker_devices) == 1:
            return value
        _check_no_function_in_eager_step()
        with _keys_of_traces():
            return super()._replica_ctx_all_reduce(tf.distribute.ReduceOp.SUM, value)

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

        if not is_seed(kwargs.get("name") or ""):
            return initial_value
        # Later replicas copy the worker's first one, which has moved already.
        places = replica_id or self._id_in_cluster * len(self.worker_devices)
        return lambda: move_seed(initial_value(), places)

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
        num_workers = 1 if _every_row.get() else self._num_workers
        if num_workers * num_devices > 1:
            local_batches.check(dataset, num_workers * num_devices)
            dataset = _copied(dataset)
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


def _extended_of(strategy):
    """Returns the `SwarmExtended` of a strategy, `None` if it has another one."""
    extended = strategy.extended
    return extended if isinstance(extended, SwarmExtended) else None


def _extended_of_replica():
    """Returns that of the replica that asks, `None` outside of a swarm's replicas."""
    replica = tf.distribute.get_replica_context()
    return replica and _extended_of(replica.strategy)


def _as_if_reduced(value):
    """Stands for a reduction over replicas in a graph that is only looked at."""

    @tf.custom_gradient
    def reduced(value):
        same = tf.numpy_function(np.asarray, [value], value.dtype)
        return tf.ensure_shape(same, value.shape), lambda gradient: gradient

    return reduced(value) if isinstance(value, tf.Tensor) else value


def _check_no_function_in_eager_step():
    """Raises an error where a device would wait for others that begin after it."""
    rows = rows_of_replicas.current()
    if rows and rows.runs_eagerly() and not tf.executing_eagerly():
        raise ValueError(
            "With `run_eagerly` the devices of a worker run one after the other, and "
            "cannot meet inside of a `tf.function`. Received: run_eagerly=True, and a "
            "step whose gradients, or losses in an evaluation, are shared in one. "
            "Compile without `run_eagerly`, or leave out the `tf.function`."
        )


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


# Keras' trainer.


def _predict_every_row(predict):
    """Lets each worker of a swarm predict all rows, instead of its share of them."""

    @functools.wraps(predict)
    def predict_every_row(self, *args, **kwargs):
        if not _extended_of(self.distribute_strategy):
            return predict(self, *args, **kwargs)
        token = _every_row.set(True)
        try:
            return predict(self, *args, **kwargs)
        finally:
            _every_row.reset(token)

    return predict_every_row


def _build_without_data(maybe_symbolic_build):
    """Tells a model of a swarm the shapes of its batches without drawing one.

    Keras would draw a batch from an iterator that it then drops, and with it what that
    has read ahead of a generator, and one round of a shuffle. A model without `call`,
    such as a GAN, is not built, as Keras does it without a strategy.
    """

    @functools.wraps(maybe_symbolic_build)
    def build(self, iterator=None, data_batch=None):
        if _extended_of(self.distribute_strategy):
            _check_trained(self)
            if type(self).call is keras.Model.call:
                if self.optimizer is not None and not self.optimizer.built:
                    with self.distribute_strategy.scope():
                        self.optimizer.build(self.trainable_variables)
                return
            if iterator is not None:
                data_batch = _known_batch(iterator)
            if data_batch is not None:
                iterator = None
        maybe_symbolic_build(self, iterator=iterator, data_batch=data_batch)

    return build


def _check_trained(model):
    """Raises a `ValueError` before an optimizer is built that cannot train a model."""
    if model.optimizer is None or model.optimizer.built:
        return
    for variable in model.optimizer.variables:
        owner = getattr(variable.value, "distribute_strategy", None)
        if owner is not model.distribute_strategy:
            where = "outside of it" if owner is None else f"under {owner!r}"
            raise ValueError(
                "A swarm needs an optimizer made in the scope of its SwarmStrategy. "
                f"Received: {type(model.optimizer).__name__}, made {where}, to train "
                f"model {model.name!r}. Make the optimizer, and compile the model, "
                "inside `with strategy.scope():` of one strategy."
            )
    for variable in model.trainable_variables:
        owner = getattr(variable.value, "distribute_strategy", None)
        if owner is not model.distribute_strategy:
            raise ValueError(
                "A swarm cannot train a variable that was not made in the scope of its "
                f"SwarmStrategy. Received: {variable.path!r} of model {model.name!r}. "
                "Make it inside `with strategy.scope():` (also what `enable_lora` and "
                "the like add to a layer), or set `trainable = False` on its layer."
            )


def _known_batch(iterator):
    """Returns what has the shapes and types of the batches of a Keras iterator.

    `None` if they are only known once a batch is drawn.
    """
    specs = tf.nest.map_structure(
        _first_spec, iterator._distributed_dataset.element_spec
    )
    shapes = [spec.shape for spec in tf.nest.flatten(specs) if spec is not None]
    if all(shape.rank is not None and None not in shape[1:] for shape in shapes):
        return specs
    # Those that Keras has drawn of a generator, and will hand out.
    batches = getattr(iterator.data_adapter, "_first_batches", None)
    return batches[0] if batches else None


def _first_spec(spec):
    """Returns the shape and type of the first replica's value, `None` without one."""
    if isinstance(spec, values.PerReplicaSpec):
        (spec, *_) = spec._value_specs
    return spec if hasattr(spec, "shape") else None


def _predict_split_batch(predict_on_batch):
    """Splits a batch over the local devices, where Keras hands all of it to each."""

    @functools.wraps(predict_on_batch)
    def predict_split_batch(self, x):
        extended = _extended_of(self.distribute_strategy)
        if extended and len(extended.worker_devices) > 1:
            x = keras.tree.map_structure(extended.split, x)
        return predict_on_batch(self, x)

    return predict_split_batch


def _of_all_workers(result_or_logs):
    """Lets what a step returns beside metrics be the mean over all workers.

    Keras makes it the mean over the local devices. Metrics ask the others anyway.
    """

    @functools.wraps(result_or_logs)
    def get(self, logs):
        if _is_in_evaluate.get():
            rows_of_replicas.end_evaluation(self.distribute_strategy)
        result = result_or_logs(self, logs)
        if result is logs and _extended_of(self.distribute_strategy):
            return self.distribute_strategy.mean_of_logs(logs)
        return result

    return get


def _evaluating(evaluate):
    """Notes that the steps of a swarm are those of an evaluation."""

    @functools.wraps(evaluate)
    def evaluate_by_all(self, *args, **kwargs):
        token = _is_in_evaluate.set(bool(_extended_of(self.distribute_strategy)))
        try:
            return evaluate(self, *args, **kwargs)
        finally:
            _is_in_evaluate.reset(token)

    return evaluate_by_all


_is_in_evaluate = contextvars.ContextVar("is_in_evaluate", default=False)


def _testing_whole_batches(make_test_function):
    """Makes all replicas evaluate a batch as one, but not what each has all rows of.

    Both have traces of their own. XLA cannot compile what asks other workers.
    """

    @functools.wraps(make_test_function)
    def make(self, force=False):
        extended = _extended_of(self.distribute_strategy)
        if not extended or (self.test_function is not None and not force):
            return make_test_function(self, force)
        make_test_function(self, True)
        of_each = self.test_function
        jit_compile = self.jit_compile
        if extended.num_workers > 1:
            self.jit_compile = False
        make_test_function(self, True)
        self.jit_compile = jit_compile
        of_all = self.test_function

        def test(iterator):
            split = tf.data.Iterator, tf.distribute.DistributedIterator
            if not isinstance(iterator, split):
                return of_each(iterator)
            with rows_of_replicas.evaluating():
                return of_all(iterator)

        self.test_function = test
        return None

    return make


def _set_jit_compile(self, value):
    """Goes on without XLA where it cannot compile, as Keras does for some layers."""
    extended = _extended_of(self.distribute_strategy)
    if value and extended and not extended.supports_jit:
        logging.warning(
            "XLA cannot compile the steps of several devices of one process, nor "
            "gradients that processes share. Received: jit_compile=%s with %d local "
            "devices. Model %r goes on with jit_compile=False. For XLA, start a "
            "process for each particle.",
            value,
            len(extended.worker_devices),
            self.name,
        )
        value = False
    _jit_compile.fset(self, value)


_Trainer = tensorflow_trainer.TensorFlowTrainer
_Trainer._get_metrics_result_or_logs = _of_all_workers(
    _Trainer._get_metrics_result_or_logs
)
_Trainer.evaluate = _evaluating(_Trainer.evaluate)
_Trainer.make_test_function = _testing_whole_batches(_Trainer.make_test_function)
_jit_compile = _Trainer.jit_compile
_Trainer.jit_compile = _jit_compile.setter(_set_jit_compile)
_Trainer.predict_on_batch = _predict_split_batch(_Trainer.predict_on_batch)
_Trainer.predict = _predict_every_row(_Trainer.predict)
_Trainer._maybe_symbolic_build = _build_without_data(_Trainer._maybe_symbolic_build)


@functools.cache
def join_failures():
    """Makes `fit`, and what else meets the other workers, tell them what ends it here.

    And `fit` begin again, to join them, where they have gone on without this worker.
    Keras tells its callbacks nothing of an exception, and hands `fit` itself to none of
    them before it runs: the methods of the class have to be replaced.
    """
    for name in "fit", "evaluate", "train_on_batch", "test_on_batch":
        setattr(keras.Model, name, _telling_the_others(getattr(keras.Model, name)))


def _telling_the_others(method):
    name = method.__name__

    @functools.wraps(method)
    def call_or_tell(self, *args, **kwargs):
        strategy = self.distribute_strategy
        group = strategy.peers if _extended_of(strategy) else None
        # What is called in a `fit` may be caught there.
        if group is None or (name != "fit" and _tells.get()):
            return method(self, *args, **kwargs)
        strategy.num_fits += name == "fit"
        while True:
            token = _tells.set(True)
            try:
                with group.barrier(f"a step of `{name}`", strategy.timeout):
                    return method(self, *args, **kwargs)
            except membership.DroppedError as error:
                if name != "fit":
                    raise
                if not group.come_back():
                    if end_in_backup := strategy.end_in_backup():
                        end_in_backup()
                    raise
                logging.warning("%s It joins them again.", error)
            except BaseException as error:
                if not getattr(error, "is_known_to_all", False):
                    text = " ".join(f"{type(error).__name__}: {error}".split())
                    text = _FRAME.sub("", text)[:1000]
                    group.end(f"Worker {group.index} left `{name}` with {text}")
                raise
            finally:
                _tells.reset(token)

    return call_or_tell


# TensorFlow's errors begin with the way to an operation, not with what failed there.
_FRAME = re.compile(r' File "[^"]+", line \d+, in \S+')
_tells = contextvars.ContextVar("tells", default=False)


def known_to_all(error):
    """Returns an exception that all workers raise: nobody need be told of it."""
    error.is_known_to_all = True
    return error


# Losses and gradients.


def _reducing_first(apply):
    """Averages the gradients of replicas that share them before all else sees them.

    Keras sums them last, so that each replica clips, checks and accumulates its part,
    and lets its own losses, but not a user's function, be a part of the whole.
    """

    @functools.wraps(apply)
    def reduce_and_apply(self, grads, trainable_variables=None):
        if _extended_of_replica() is None:
            _check_no_swarms(self)
        rows = rows_of_replicas.current()
        alone = _replicas_per_particle() == 1
        if (alone and not rows) or _gradients_reduced.get():
            return apply(self, grads, trainable_variables)
        grads = list(grads)
        there = [place for place, grad in enumerate(grads) if grad is not None]
        means = _if_any([grads[place] for place in there], rows)
        if not alone:
            means = tf.distribute.get_replica_context().all_reduce(
                tf.distribute.ReduceOp.MEAN, means
            )
        for place, grad in zip(there, means):
            grads[place] = grad
        token = _gradients_reduced.set(True)
        try:
            return apply(self, grads, trainable_variables)
        finally:
            _gradients_reduced.reset(token)

    return reduce_and_apply


def _check_no_swarms(optimizer):
    """Raises a `RuntimeError` if an optimizer is a swarm's, outside of its replicas."""
    variables = (variable.value for variable in optimizer.variables)
    if any(isinstance(variable, SwarmVariable) for variable in variables):
        raise RuntimeError(
            "A swarm's optimizer moves the weights of a particle inside its replica, "
            "and cannot move those of all particles by one gradient. Received: "
            f"{type(optimizer).__name__}, called outside of the replicas. Train by "
            "`fit` or `train_on_batch`, with a `train_step` of your own if need be, or "
            "call a step of a loop of your own by `strategy.run`."
        )


def _if_any(grads, rows):
    """Returns gradients, or 0 if there are no rows, of which a mean is NaN."""
    if rows is None or rows.num_rows or not grads:
        return grads

    def zeros():
        return tf.nest.map_structure(
            lambda part: tf.zeros_like(part) if part.dtype.is_floating else part,
            grads,
            expand_composites=True,
        )

    return tf.cond(rows.weight() > 0, lambda: grads, zeros)


# One may call another: the outermost is the first to see the gradients.
for _optimizer in (
    keras.optimizers.Optimizer,
    keras.optimizers.LossScaleOptimizer,
):
    _optimizer.apply = _reducing_first(_optimizer.apply)


def _replicas_per_particle():
    """Returns how many replicas average the gradients of the one that asks."""
    extended = _extended_of_replica()
    return extended.replicas_per_particle if extended else 1


def _rows_of_all():
    """Returns the rows of a replica that takes a batch with others, if it may ask them.

    All take the same steps in training and in an evaluation, but not in what a user
    calls beside.
    """
    rows = rows_of_replicas.current()
    known = rows and (rows.may_ask() or record.could_possibly_record())
    return rows if known and rows.replicas > 1 else None


_OF_ALL_ROWS = "sum_of_all_rows_of_a_swarm"


def _of_all_rows(reduce_values):
    """Lets the loss of replicas that share gradients be that of all their rows.

    Their gradients are averaged by their rows, as suits a mean over the rows.
    """

    @functools.wraps(reduce_values)
    def reduce(values, sample_weight=None, reduction="sum_over_batch_size"):
        loss = reduce_values(values, sample_weight, reduction)
        if rows := rows_of_replicas.current():
            rows.has_keras_loss = True
            rows.has_own_loss |= not values.shape.rank
        if tuple(values.shape) == (0,) and reduction not in (None, "none"):
            loss = keras.ops.sum(values)  # Keras would return no scalar.
        rows, current = _rows_of_all(), rows_of_replicas.current()
        shares = current.shares if current else _replicas_per_particle()
        if (shares == 1 and not rows) or not values.shape.rank:
            return loss
        if reduction == "sum":
            factor = rows.weight_of_sum() if rows else shares
            return tf.multiply(loss, tf.cast(factor, loss.dtype), name=_OF_ALL_ROWS)
        weighted = reduction == "mean_with_sample_weight" and sample_weight is not None
        if weighted and rows:
            own = keras.ops.sum(keras.ops.cast(sample_weight, "float32"))
            share = tf.math.divide_no_nan(own, rows.sum(own))
            factor = tf.cast(share * rows.times_own(), loss.dtype)
            return tf.multiply(loss, factor, name=_OF_ALL_ROWS)
        return loss

    return reduce


def _with_masks_of_all_rows(apply_mask):
    """Lets a mean over what a mask leaves be that over all replicas' rows."""

    @functools.wraps(apply_mask)
    def apply(sample_weight, mask, dtype, reduction):
        weight = apply_mask(sample_weight, mask, dtype, reduction)
        means = mask is not None and reduction in ("mean", "sum_over_batch_size")
        rows = _rows_of_all() if means else None
        if not rows:
            return weight
        valid = keras.ops.sum(keras.ops.cast(mask, "float32"))
        # Keras counts what is valid among the entries of this replica.
        share = tf.math.divide_no_nan(valid, rows.sum(valid))
        return weight * tf.cast(share * rows.times_own(), weight.dtype)

    return apply


def _with_gradients_of_sums(call):
    """Does so for a compiled loss without reduction, of which Keras trains the sum."""

    @functools.wraps(call)
    def compute(*args, **kwargs):
        loss = call(*args, **kwargs)
        rows = rows_of_replicas.current()
        is_found = tf.is_symbolic_tensor(loss) and rows  # By the tape.
        more = (rows.shares if rows else _replicas_per_particle()) - 1
        if not more or not loss.shape.rank or is_found:
            return loss
        if rows := _rows_of_all():
            more = tf.cast(rows.weight_of_sum() - 1, loss.dtype)
        return loss + more * (loss - tf.stop_gradient(loss))

    return compute


def _with_gradients_of_all_rows(gradient):
    """Weights the gradients of a loss of replicas that share them by their rows.

    Here, and not once they are known: by layers such as a synchronised normalisation
    they have to do with the other replicas' losses, too. Those of a user's own sums
    over the rows are not weighted; only the graph of a loss tells them from means.
    """

    @functools.wraps(gradient)
    def compute(self, target, sources, output_gradients=None, **kwargs):
        rows = rows_of_replicas.current()
        shared = rows and rows.replicas > 1 and not rows.evaluates
        are_weights = all(
            isinstance(source, (tf.Variable, keras.Variable))
            for source in tf.nest.flatten(sources)
        )
        if not (shared and are_weights and output_gradients is None):
            return gradient(self, target, sources, output_gradients, **kwargs)
        targets = tf.nest.flatten(target)
        weights = [tf.cast(rows.weight(), loss.dtype) for loss in targets]
        for place, loss in enumerate(list(targets)):
            parts = _parts(loss, rows)
            if rows.losses and rows.losses.is_sum("gradient", None, loss, parts):
                weights[place] = tf.cast(rows.shares, loss.dtype)
            for part in parts:
                _check_part(part, sources)
                if part.kind is sums_of_rows.Kind.SUM:
                    more = tf.cast(rows.shares - rows.weight(), part.tensor.dtype)
                    targets.append(part.tensor)
                    weights.append(more * part.factor())
        output_gradients = [
            weight * tf.ones_like(loss) for weight, loss in zip(weights, targets)
        ]
        return gradient(self, targets, sources, output_gradients, **kwargs)

    return compute


def _parts(loss, rows):
    """Returns what `sums_of_rows` finds in a loss; nothing where it has no graph."""
    if not tf.is_symbolic_tensor(loss):
        return []
    return sums_of_rows.find(loss, rows.num_rows, _is_whole, inside)


def _is_whole(tensor):
    return _OF_ALL_ROWS in tensor.op.name


# Attributes that name the functions of an op.
_FUNCTIONS = {
    "PartitionedCall": ("f",),
    "StatefulPartitionedCall": ("f",),
    "If": ("then_branch", "else_branch"),
    "StatelessIf": ("then_branch", "else_branch"),
}


def _functions_of(op):
    names = [op.get_attr(attr).name for attr in _FUNCTIONS.get(op.type, ())]
    return [op.graph._get_function(name).graph for name in names]


def inside(tensor):
    """Returns what `sums_of_rows.find` asks of a function that returns a tensor."""
    outside = tensor.op.inputs
    return [
        (
            graph.outputs[tensor.value_index],
            {a.ref(): b for a, b in zip(graph.inputs[::-1], outside[::-1])},
        )
        for graph in _functions_of(tensor.op)
    ]


def _check_part(part, weights):
    """Raises an error, or warns once, if a part of a loss cannot be of all rows."""
    op = part.tensor.op
    if part.kind is sums_of_rows.Kind.MIXED:
        functions = " or ".join(repr(graph.name) for graph in _functions_of(op))
        raise ValueError(
            "Devices that share gradients cannot find the sum over the rows of a batch "
            "that a function of the graph adds to something else. Received: a loss of "
            f"{functions}. Leave out the `tf.function` around it (Keras compiles the "
            "whole step) or the `tf.cond`, or take the sum by a compiled loss with "
            '`reduction="sum"`.'
        )
    if part.kind is sums_of_rows.Kind.OTHER:
        _warn_once(_OWN_ROWS % (op.name, op.type), weights)


_OWN_ROWS = (
    "The loss has %r (%s), of which each device that shares gradients sees its own "
    "rows alone: the gradient is the mean of what they make of their rows, and not "
    "that of all rows. A mean or a sum over the rows is right, and so is what is made "
    "of `tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, "
    "sum_over_rows)`."
)
# The first weights of those that a loss trains which has had a warning, by their `id`.
_warned: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()


def _warn_once(text, weights):
    first = tf.nest.flatten(weights)[0]
    if id(first) not in _warned:
        _warned[id(first)] = first
        logging.warning(text)


def _noting_losses(add_loss):
    """Notes that the loss of a step is not only that of a Keras loss."""

    @functools.wraps(add_loss)
    def add(self, loss):
        rows = rows_of_replicas.current()
        if rows and self.activity_regularizer is None:  # Keras makes its a mean.
            rows.has_own_loss = True
        return add_loss(self, loss)

    return add


def _whole(value, rows, name=None):
    """Returns a scalar in which sums over the rows count for all replicas' rows.

    The mean over the replicas by their rows is then that of all rows.

    Args:
        value: The scalar.
        rows: The `RowsOfReplicas`.
        name: That under which a step returns it, if it does.
    """
    if rows.replicas == 1:
        return value

    def weight():
        return rows.weight_of_sum() if _rows_of_all() else rows.shares

    parts = _parts(value, rows)
    if rows.losses and rows.losses.is_sum("report", name, value, parts):
        return value * tf.cast(weight(), value.dtype)
    for part in parts:
        if part.kind is sums_of_rows.Kind.SUM:
            more = tf.cast(weight() - 1, value.dtype) * part.factor()
            value += more * tf.reduce_sum(part.tensor)
    return value


class LossesOfStep:
    """Tells what the losses of a step that runs eagerly make of the rows.

    By the graph that it would have, which is traced when that first matters: all layers
    are built by then.

    Args:
        step: The function that `strategy.run` was given.
        function: The function that a replica runs.
        arguments: Its positional arguments and those by name.
        rows: The `RowsOfReplicas`.
    """

    def __init__(self, step, function, arguments, rows):
        self._model = getattr(step, "__self__", None)
        self._step, self._call, self._rows = step, (function, arguments), rows
        self._met = collections.Counter()
        is_model = isinstance(self._model, keras.Model)
        self._is_keras = is_model and all(
            getattr(type(self._model), name) is getattr(_Trainer, name, None)
            or getattr(type(self._model), name) is getattr(keras.Model, name)
            for name in (step.__name__, "compute_loss")
        )

    def is_sum(self, sort, name, value, parts):
        """Tells whether a loss that the step comes to is a sum over the rows.

        Args:
            sort: "gradient" or "report".
            name: What tells it from others; `None` for its place among them.
            value: The loss.
            parts: What `sums_of_rows.find` tells of it, here nothing.
        """
        del parts
        if name is None:
            name = self._met[sort]
            self._met[sort] += 1
        is_keras = self._is_keras and not self._rows.has_own_loss
        if is_keras or tf.is_symbolic_tensor(value):  # In a function of its own.
            return False
        kind = self._kinds().get((sort, name))
        is_keras = self._rows.has_keras_loss and not self._rows.has_own_loss
        if kind is sums_of_rows.Kind.MIXED or (kind is None and not is_keras):
            raise ValueError(_EAGER.format(self._step))
        return kind is sums_of_rows.Kind.SUM

    def is_state(self, name, known):
        """Tells whether a scalar that a step returns comes from variables alone."""
        if self._is_keras:
            return True  # Of metrics.
        return self._kinds().get(("state", name), known)

    def _kinds(self):
        # Until it is compiled again, as a train function keeps its graph.
        owner = self._step if self._model is None else self._model
        known = _kinds_of_steps.setdefault(owner, {})
        name = getattr(self._step, "__name__", None)
        if name not in known:
            known[name] = self._trace()
        return known[name]

    def _trace(self):
        function, arguments = self._call
        learner = _Learner()
        flat = tf.nest.flatten(arguments)
        places = [place for place, value in enumerate(flat) if tf.is_tensor(value)]
        size = self._rows.num_rows

        def look(*tensors):
            values = list(flat)
            for place, tensor in zip(places, tensors):
                values[place] = tensor
            args, kwargs = tf.nest.pack_sequence_as(arguments, values)
            batch = rows_of_replicas.first_batch((args, kwargs))
            rows = self._rows.trial(batch, learner)
            with rows.known():
                of_all_rows(function(*args, **kwargs), rows)

        def spec(value):
            spec = tf.type_spec_from_value(value)
            if isinstance(spec, tf.TensorSpec) and spec.shape[:1] == [size]:
                spec = tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)
            return spec

        layers = self._model._flatten_layers() if self._model else ()
        losses = [(layer._losses, list(layer._losses)) for layer in layers]
        try:
            tf.function(look, autograph=False).get_concrete_function(
                *(spec(flat[place]) for place in places)
            )
        except Exception as error:
            logging.info("A step that runs eagerly has no graph: %s", error)
        finally:
            for there, before in losses:
                there[:] = before
        return learner.kinds


class _Learner:
    """Learns from a graph what the losses of a step are."""

    def __init__(self):
        self.kinds = {}
        self._met = collections.Counter()

    def is_sum(self, sort, name, value, parts):
        if name is None:
            name = self._met[sort]
            self._met[sort] += 1
        is_trained = sort == "gradient"
        self.kinds[sort, name] = sums_of_rows.kind_of_all(value, parts, is_trained)
        return False

    def is_state(self, name, known):
        self.kinds["state", name] = known
        return known


_kinds_of_steps: weakref.WeakKeyDictionary[object, dict] = weakref.WeakKeyDictionary()


def _forgetting_steps(compile_model):
    @functools.wraps(compile_model)
    def compile_anew(self, *args, **kwargs):
        _kinds_of_steps.pop(self, None)
        return compile_model(self, *args, **kwargs)

    return compile_anew


# There Keras looks for it, to tell whether a user has a `compile` of his own.
base_trainer.Trainer.compile = _forgetting_steps(base_trainer.Trainer.compile)
_EAGER = (
    "Devices that share gradients tell a sum over the rows from a mean by the graph of "
    "a loss, and a step that runs eagerly has none. Received: run_eagerly=True, and a "
    "loss of {!r} that is not by itself a mean or a sum, or a step of which no graph "
    "can be made. Compile without `run_eagerly`, or take the loss by a loss of Keras "
    '(`reduction="sum"` for a sum).'
)


def _by_rows(update_state):
    """Counts a loss that a replica gives a mean by its rows, and none without rows."""

    @functools.wraps(update_state)
    def update(self, values, sample_weight=None):
        rows = rows_of_replicas.current()
        if rows and not keras.ops.ndim(values):
            values = _whole(tf.convert_to_tensor(values), rows)
            if sample_weight is None:
                sample_weight = rows.weight_of_metric()
        elif rows and not rows.num_rows and _is_mean_of_rows(values, sample_weight):
            values = keras.ops.mean(values)  # As Keras does it.
        if rows and not keras.ops.ndim(values):
            values = tf.where(rows.has_any(), values, tf.zeros_like(values))
        return update_state(self, values, sample_weight=sample_weight)

    return update


def _is_mean_of_rows(values, sample_weight):
    """Tells whether Keras takes a mean of losses of rows, which is NaN of none."""
    is_masked = getattr(values, "_keras_mask", None) is not None
    weighs_all = sample_weight is not None and not keras.ops.ndim(sample_weight)
    return weighs_all and not is_masked


def of_all_rows(results, rows):
    """Lets the scalars that a step returns, whose mean Keras reports, count by rows."""
    if not isinstance(results, dict):
        return results
    results = dict(results)
    for name, value in results.items():
        if not isinstance(value, tf.Tensor) or value.shape.rank:
            continue
        is_state = sums_of_rows.is_state(value)
        if rows.losses:
            is_state = rows.losses.is_state(name, is_state)
        if value.dtype.is_floating and not is_state:
            weight = tf.cast(rows.weight_of_report(), value.dtype)
            whole = _whole(value, rows, name)
            results[name] = tf.math.multiply_no_nan(whole, weight)
    return results


loss_lib.reduce_values = _of_all_rows(loss_lib.reduce_values)
loss_lib.apply_mask = _with_masks_of_all_rows(loss_lib.apply_mask)
keras.layers.Layer.add_loss = _noting_losses(keras.layers.Layer.add_loss)
_CompileLoss = compile_utils.CompileLoss
_CompileLoss.call = _with_gradients_of_sums(_CompileLoss.call)
tf.GradientTape.gradient = _with_gradients_of_all_rows(tf.GradientTape.gradient)
keras.metrics.Mean.update_state = _by_rows(keras.metrics.Mean.update_state)


# No rows.


def _may_lack_rows(inputs):
    extended = _extended_of_replica()
    unknown = isinstance(inputs, tf.Tensor) and inputs.shape[0] in (None, 0)
    return unknown and extended is not None and extended._num_replicas_in_sync > 1


def _padded(value):
    """Returns a tensor with a row of zeros if it has none.

    Where there are rows, neither `tf.pad` nor `tf.slice` copies anything; `tf.cond`
    took a third of a step.
    """
    rows, *others = tf.unstack(tf.shape(value))
    padding = [[0, tf.maximum(1 - rows, 0)], *([0, 0] for _ in others)]
    return tf.ensure_shape(tf.pad(value, padding), [None, *value.shape[1:]])


def _of_rows(value, rows):
    """Returns the first rows of a tensor."""
    sizes = [rows, *tf.unstack(tf.shape(value))[1:]]
    first = tf.slice(value, [0] * len(sizes), sizes)
    return tf.ensure_shape(first, [None, *value.shape[1:]])


def _never_without_rows(function):
    """Gives a function that has no rows one of zeros, which reaches nothing.

    On CPUs oneDNN gives a convolution of no rows the shape of what went in, and ends
    the process at the gradient of max-pooling no rows.
    """

    @functools.wraps(function)
    def call(inputs, *args, **kwargs):
        if not _may_lack_rows(inputs):
            return function(inputs, *args, **kwargs)
        outputs = function(_padded(inputs), *args, **kwargs)
        return _of_rows(outputs, tf.shape(inputs)[0])

    return call


for _name in ("conv", "separable_conv", "max_pool"):
    setattr(nn, _name, _never_without_rows(getattr(nn, _name)))


def _keeping_moments(call):
    """Lets no rows leave moving moments as they are: theirs are none."""

    @functools.wraps(call)
    def normalize(self, inputs, training=None, mask=None):
        # Synchronised moments are those of all replicas, which may have rows.
        moves = training and self.trainable and not self.synchronized
        if not (moves and _may_lack_rows(inputs)):
            return call(self, inputs, training=training, mask=mask)
        rows = tf.shape(inputs)[0]
        moments = self.moving_mean, self.moving_variance
        before = [tf.identity(moment.value) for moment in moments]
        mask = None if mask is None else _padded(mask)
        outputs = call(self, _padded(inputs), training=training, mask=mask)
        for moment, value in zip(moments, before):
            moment.assign(tf.where(rows > 0, moment.value, value))
        return _of_rows(outputs, rows)

    return normalize


_Normalization = keras.layers.BatchNormalization
_Normalization.call = _keeping_moments(_Normalization.call)


# The `fit` that is under way.


def calling_list(callback):
    """Returns the `keras.callbacks.CallbackList` that calls a callback, or `None`.

    A callback is not told of the others of its `fit`. The list that calls it is the
    `self` of a frame of the stack.
    """
    frame = inspect.currentframe()
    while frame := frame.f_back:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return caller if callback in caller.callbacks else None
    return None


def is_fitting(model):
    """Tells whether a model's `fit` is under way in this thread."""
    frame = inspect.currentframe()
    while frame := frame.f_back:
        if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is model:
            return True
    return False


def begin_at_epoch(model, epoch):
    """Makes `fit` begin at an epoch, `None` for where its caller says.

    As Keras' own BackupAndRestore does it.
    """
    model._initial_epoch = epoch


def shows_moving_averages(callbacks):
    """Tells whether a SwapEMAWeights has put moving averages in the weights' place."""
    return any(callback._ema_weights_in_model for callback in callbacks)


# What a model consists of.

# What a model holds that is not its own: other models that share a layer, all variables
# of the scope, the arrays of a training that was cut short.
_NOT_ITS_OWN = frozenset(
    {
        "_inbound_nodes",
        "_outbound_nodes",
        "_nodes",
        "_nodes_by_depth",
        "_eval_epoch_iterator",
        "_swarm_synchronizer",
    }
)
_HOLDS_NONE = (
    str,
    bytes,
    int,
    float,
    type(None),
    type,
    np.ndarray,
    np.generic,
    tf.Tensor,
    tf.Graph,
    tf.data.Dataset,
    tf.distribute.Strategy,
    types.ModuleType,
    types.FunctionType,
    keras.KerasTensor,
    keras.callbacks.Callback,
)


def reached(model):
    """Returns all objects that a model holds, through attributes and containers.

    Keras' own lists do not name the optimizers, metrics and variables that are a
    user's attributes.

    Args:
        model: A `keras.Model`.

    Returns:
        A list: among others `tf.Variable`s and Keras' objects, each once.
    """
    found, waiting = {}, [model]
    while waiting:
        value = waiting.pop()
        if id(value) in found or isinstance(value, _HOLDS_NONE):
            continue
        found[id(value)] = value
        if isinstance(value, tf.Variable):
            continue
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            waiting.extend(value)
        elif isinstance(value, types.MethodType):
            waiting.append(value.__self__)
        else:
            attributes = getattr(value, "__dict__", {})
            waiting.extend(
                part for name, part in attributes.items() if name not in _NOT_ITS_OWN
            )
    return list(found.values())


def written_handles(graph):
    """Returns the handles, outside of all graphs, of what a traced graph writes."""
    captured, level = {}, graph
    while hasattr(level, "captures"):
        captured.update((id(inside), outside) for outside, inside in level.captures)
        level = level.outer_graph
    handles = []
    for operation in graph.get_operations():
        _, writes = auto_control_deps_utils.get_read_write_resource_inputs(operation)
        for handle in writes:
            while id(handle) in captured:
                handle = captured[id(handle)]
            handles.append(handle)
    return handles


# Keras 3.10 has none.
_SEVERAL: tuple[type, ...] = ()


if hasattr(keras.optimizers, "MultiOptimizer"):
    _SEVERAL = (keras.optimizers.MultiOptimizer,)


def optimizers_of(objects):
    """Returns the optimizers among objects; not those that only wrap another one."""
    wrappers = (keras.optimizers.LossScaleOptimizer, *_SEVERAL)
    return [
        value
        for value in objects
        if isinstance(value, keras.optimizers.Optimizer)
        and not isinstance(value, wrappers)
    ]


def learning_rate(optimizer):
    """Returns the rate of an optimizer's next step, the mean of those of several."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if isinstance(optimizer, _SEVERAL):
        rates = [learning_rate(part) for part in optimizer.optimizers]
        return tf.add_n(rates) / len(rates)
    return tf.cast(optimizer.learning_rate, tf.float64)


def means(model):
    """Returns the `keras.metrics.Mean`s of a compiled model, Keras' loss tracker first.

    Keras' own tracker is in `model.metrics` only as long as the model has no `metrics`
    of its own, and a metric that `train_step` alone knows is only among what the layer
    tracks.
    """
    found = {}
    for metric in (model._loss_tracker, *model.metrics, *model._metrics):
        if isinstance(metric, keras.metrics.Mean):
            found.setdefault(id(metric), metric)
    return list(found.values())


@contextlib.contextmanager
def noted_results(metrics):
    """Yields a dict from the number of a metric to the results that it gives.

    By these alone can it be told from which metric a `train_step` has a number. Several
    replicas may be in their steps at the same time, each in a thread of its own.
    """
    given = {number: [] for number in range(len(metrics))}
    token = _given.set({id(metric): given[i] for i, metric in enumerate(metrics)})
    for metric in metrics:
        if id(metric) not in _noting:
            # Past Keras, which tracks what a metric is given.
            result = functools.partial(_note_result, id(metric), metric.result)
            object.__setattr__(metric, "result", result)
        _noting[id(metric)] += 1
    try:
        yield given
    finally:
        _given.reset(token)
        for metric in metrics:
            _noting[id(metric)] -= 1
            if not _noting[id(metric)]:
                del _noting[id(metric)]
                object.__delattr__(metric, "result")


def _note_result(key, result):
    value = result()
    if (given := _given.get()) and key in given:
        given[key].append(value)
    return value


# How many replicas note the results of a metric, and lists of what this one has noted.
_noting: collections.Counter[int] = collections.Counter()
_given: contextvars.ContextVar[dict[int, list] | None] = contextvars.ContextVar(
    "given", default=None
)


def moving_averages(optimizer):
    """Returns pairs of a weight and the moving average that an optimizer has of it."""
    averages = getattr(optimizer, "_model_variables_moving_average", ())
    return [
        (weight, average)
        for weight, average in zip(optimizer._trainable_variables, averages)
        if average is not None
    ]


def call_traced(traced, tensors):
    """Returns what a `ConcreteFunction` does.

    Args:
        traced: The `ConcreteFunction`.
        tensors: A list of tensors like those that it was traced with.
    """
    return traced._call_flat(tensors, traced.captured_inputs)
