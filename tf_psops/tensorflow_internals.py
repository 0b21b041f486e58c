"""The one module that touches TensorFlow's private API.

Everything here was checked against TensorFlow 2.19.1 with Keras 3.10 and 2.21.0 with
Keras 3.15; `python -m tests.compatibility` runs the suite on both.
Private names used, and why no public one serves:

  * `CollectiveAllReduceExtended` holds the cluster set-up, the per-device
    variables and the input pipeline of `MultiWorkerMirroredStrategy`. Keras 3
    takes a path that fails for instances of the public class (keras issue 20585),
    so the public class cannot be the base.
  * `input_util.get_distributed_dataset` shares rows out to the workers for
    `experimental_distribute_dataset`, which would hand them to several local CPUs by
    an iterator that may crash. `distribute.compute_batch_size` and `values.PerReplica`
    serve for the way without it.
  * `Dataset._functions` and `Dataset._inputs` tell which data sets run Python code.
  * `TensorFlowTrainer.predict` and `_maybe_symbolic_build`: where Keras decides which
    rows a model predicts, and draws a batch to build it.
  * `context.context().configure_coordination_service` is the only place where
    the time-out for a peer that never starts can be set.
  * `context.context().report_error_to_cluster` and `abort_collective_ops` alone end
    collectives that wait; `check_collective_ops_peer_health` tells which of them can.
  * `multi_device_iterator_ops._create_device_dataset` makes the data sets that hand
    batches to several local GPUs. See `_without_tuning`.
"""

import contextlib
import contextvars
import functools
import inspect
import itertools
import weakref

import keras
import numpy as np
import tensorflow as tf
from keras.src.backend.tensorflow import trainer as tensorflow_trainer
from tensorflow.compiler.xla.tsl.protobuf import coordination_config_pb2
from tensorflow.python.data.experimental.ops import distribute
from tensorflow.python.data.ops import multi_device_iterator_ops
from tensorflow.python.distribute import (
    collective_all_reduce_strategy,
    input_util,
    multi_worker_util,
    values,
)
from tensorflow.python.eager import context

from tf_psops import local_batches

_SEED_STRIDE = 1_000_003

# Group keys of its own for every strategy: TensorFlow takes a key for one number of
# replicas only, and ends all collectives of the process where two strategies share
# one. All workers make their strategies in the same order.
_collective_key_bases = itertools.count(0, 1000)


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


# Whether a data set is to give all rows to every worker, and not a share to each.
_every_row = contextvars.ContextVar("every_row", default=False)


class SwarmExtended(collective_all_reduce_strategy.CollectiveAllReduceExtended):
    """Replicas that share a cluster and start equal, and then train apart."""

    def __init__(
        self,
        strategy,
        devices,
        cluster_resolver,
        communication_options,
        startup_timeout,
        share_gradients,
    ):
        self._swarm_devices = devices
        self._share_gradients = share_gradients
        self._startup_timeout = startup_timeout
        self._shared_out = weakref.WeakSet()  # Data sets that are shared out already.
        # The base class asks its strategy for it.
        strategy._collective_key_base = next(_collective_key_bases)
        super().__init__(strategy, cluster_resolver, communication_options)

    # Called while `__init__` of the base class sets up the cluster.

    def _initialize_local_devices(self, cluster_resolver, worker_device):
        """Lets the caller's devices stand for all local ones, in a cluster too."""
        if not self._swarm_devices:
            return super()._initialize_local_devices(cluster_resolver, worker_device)
        specs = [tf.DeviceSpec.from_string(device) for device in self._swarm_devices]
        device_type = specs[0].device_type
        devices = tuple(
            f"{worker_device}/device:{spec.device_type}:{spec.device_index}"
            for spec in specs
        )
        return devices, device_type

    def _initialize_multi_worker(self, cluster_resolver):
        """Bounds the wait for the peers, which the base class leaves unbounded."""
        cluster = multi_worker_util.normalize_cluster_spec(
            cluster_resolver.cluster_spec()
        )
        self._leader = multi_worker_util.coordination_leader(cluster)
        tasks = cluster.as_dict()
        workers = [*tasks.get("chief", []), *tasks.get("worker", [])]
        self.hosts = [worker.rpartition(":")[0].strip("[]") for worker in workers]
        context.context().configure_coordination_service(
            service_type="standalone",
            service_leader=self._leader,
            cluster_register_timeout_in_ms=int(self._startup_timeout * 1000),
            coordinated_jobs=[
                coordination_config_pb2.CoordinatedJob(
                    name=job, num_tasks=cluster.num_tasks(job)
                )
                for job in ("chief", "worker")
                if job in cluster.jobs
            ],
        )
        # Else the time-out is the others' alone: the chief would wait on for ever.
        context.context().coordination_service.cluster_register_with_barrier = True
        super()._initialize_multi_worker(cluster_resolver)

    # Variables: one of its own for every replica.

    def _create_variable(self, next_creator, **kwargs):
        """Gives every replica its own copy where the base class would mirror one.

        Writes stay on their replica, and a read outside the replicas takes the
        first local copy without a collective, so that what only the chief does
        (saving, say) cannot wait for a peer.
        """
        synchronization = kwargs.get("synchronization")
        if synchronization is not tf.VariableSynchronization.ON_READ:
            kwargs["synchronization"] = tf.VariableSynchronization.ON_READ
            kwargs["aggregation"] = tf.VariableAggregation.ONLY_FIRST_REPLICA
        with self._container_strategy().meeting("the chief's value of a new variable"):
            return super()._create_variable(next_creator, **kwargs)

    def _reduce_to(self, reduce_op, value, destinations, options):
        with self._container_strategy().meeting("a metric of the whole swarm"):
            return super()._reduce_to(reduce_op, value, destinations, options)

    def end_collectives(self, message):
        """Ends the collectives of all workers, now and later, with an error."""
        try:
            # The report would wait for a leader that hangs, with all of Python.
            context.context().check_collective_ops_peer_health(
                self._leader, timeout_in_ms=5000
            )
            context.context().report_error_to_cluster(tf.errors.ABORTED, message)
        except tf.errors.OpError:
            # Some other error was first, or only this worker's can be ended.
            context.context().abort_collective_ops(tf.errors.ABORTED, message)

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
        return self._num_replicas_in_sync if self._share_gradients else 1

    def _replica_ctx_all_reduce(self, reduce_op, value, options=None):
        """Reduces over the replicas of one particle: over one, no collective runs."""
        if self.replicas_per_particle == 1:
            return value
        return super()._replica_ctx_all_reduce(reduce_op, value, options)

    # Initial values: the chief's, but a random stream of its own for every replica.

    def _get_variable_creator_initial_value(
        self, replica_id, device, primary_var, **kwargs
    ):
        """Checks that the workers make the same variable, and takes the chief's value.

        That goes over the swarm's own wire where there is one. And moves Keras' random
        seeds apart, so that dropout masks differ.
        """
        make = super()._get_variable_creator_initial_value
        name = kwargs.get("name") or ""

        def initial_value():
            value = kwargs["initial_value"]
            if replica_id == 0 and tf.executing_eagerly():
                value = value() if callable(value) else value
                value = tf.convert_to_tensor(value, kwargs.get("dtype"))
                shape, dtype = tuple(value.shape), value.dtype.name
                strategy = self._container_strategy()
                strategy.check_same(
                    f"a new variable of shape {shape} and type {dtype}", {}, name
                )
                if strategy.wire:
                    flat = value.numpy().ravel()
                    flat = strategy.wire.broadcast(flat, 0, np.empty_like(flat))
                    return tf.reshape(flat, value.shape)
            made = {**kwargs, "initial_value": value}
            return make(
                replica_id=replica_id, device=device, primary_var=primary_var, **made
            )()

        if "seed_generator_state" not in name:
            return initial_value
        # Later replicas copy the worker's first one, which has moved already.
        local = len(self.worker_devices)
        places = replica_id if replica_id else self._id_in_cluster * local

        def moved():
            seed = initial_value()
            offset = tf.constant([places * _SEED_STRIDE % 0x7FFFFFFF, 0], tf.int64)
            return tf.cast(tf.cast(seed, tf.int64) + offset, seed.dtype)

        return moved

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
        is_cpu = self._local_device_type == "CPU"
        num_shares = num_workers if is_cpu else num_workers * num_devices
        if num_shares > 1 or not is_cpu:
            shared_out = input_util.get_distributed_dataset(
                dataset,
                self._input_workers_with_options(options),
                self._container_strategy(),
                num_replicas_in_sync=num_shares,
                input_context=tf.distribute.InputContext(
                    num_input_pipelines=num_workers,
                    input_pipeline_id=0 if num_workers == 1 else self._id_in_cluster,
                    num_replicas_in_sync=num_shares,
                ),
                options=options,
            )
            if not is_cpu:
                return shared_out
            (dataset,) = shared_out._cloned_datasets
            self._shared_out.add(dataset)
        if num_devices > 1:
            full_size = int(distribute.compute_batch_size(dataset))
            dataset = local_batches.split(
                dataset, full_size, num_devices, values.PerReplica
            )
            self._shared_out.add(dataset)
        return dataset

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


def _predict_every_row(predict):
    """Lets each worker of a swarm predict all rows, instead of its share of them."""

    @functools.wraps(predict)
    def predict_every_row(self, *args, **kwargs):
        if not isinstance(self.distribute_strategy.extended, SwarmExtended):
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
    has read ahead of a generator, and one round of a shuffle.
    """

    @functools.wraps(maybe_symbolic_build)
    def build(self, iterator=None, data_batch=None):
        extended = self.distribute_strategy.extended
        if iterator is not None and isinstance(extended, SwarmExtended):
            specs = tf.nest.map_structure(
                _first_spec, iterator._distributed_dataset.element_spec
            )
            known = (
                s is None or s.shape.rank is not None for s in tf.nest.flatten(specs)
            )
            if all(known):
                iterator, data_batch = None, specs
        maybe_symbolic_build(self, iterator=iterator, data_batch=data_batch)

    return build


def _first_spec(spec):
    """Returns the shape and type of the first replica's value, `None` without one."""
    if isinstance(spec, values.PerReplicaSpec):
        (spec, *_) = spec._value_specs
    return spec if hasattr(spec, "shape") else None


_Trainer = tensorflow_trainer.TensorFlowTrainer
_Trainer.predict = _predict_every_row(_Trainer.predict)
_Trainer._maybe_symbolic_build = _build_without_data(_Trainer._maybe_symbolic_build)


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


def updated_state(model):
    """Returns the float variables that training updates without gradients.

    Moving statistics, say. `model.non_trainable_variables` also names the weights
    of frozen layers, which never change and need not travel; only the layers
    themselves know the difference.
    """
    return [
        variable
        for layer in model._flatten_layers()
        if layer.trainable
        for variable in layer._non_trainable_variables
        if tf.as_dtype(variable.dtype).is_floating
    ]


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

    By these alone can it be told from which metric a `train_step` has a number.
    """
    given = {number: [] for number in range(len(metrics))}

    def noting(number, result):
        def noted():
            given[number].append(result())
            return given[number][-1]

        return noted

    try:
        for number, metric in enumerate(metrics):
            # Past Keras, which tracks what a metric is given.
            object.__setattr__(metric, "result", noting(number, metric.result))
        yield given
    finally:
        for metric in metrics:
            object.__delattr__(metric, "result")


def begin_at_epoch(model, epoch):
    """Makes `fit` begin at an epoch, `None` for where its caller says.

    As Keras' own BackupAndRestore does it.
    """
    model._initial_epoch = epoch
