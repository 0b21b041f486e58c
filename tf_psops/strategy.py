"""The strategy whose replicas are the particles of a swarm."""

import contextlib
import functools
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import keras
import tensorflow as tf
from absl import logging

from tf_psops import _checks, cluster, tensorflow_internals
from tf_psops.batches import rows_of_replicas
from tf_psops.transport import group, handshake, initial_values
from tf_psops.transport import tls as tls_lib
from tf_psops.transport.collectives import Collectives
from tf_psops.version import __version__


class SwarmStrategy(tf.distribute.Strategy):
    """Trains every replica apart from the others: each is one particle of a swarm.

    It is `tf.distribute.MultiWorkerMirroredStrategy` without the mirror: the same
    `TF_CONFIG` and the same sharding of a global batch over the replicas, but every
    replica has its own weights, optimizer slots and non-trainable state, and its
    gradients never leave it. All replicas start from the chief's weights; only the
    random layers (dropout, augmentation) differ from replica to replica. Between two
    synchronisations by `tf_psops.PSOSync` no collective runs, except where Keras itself
    asks for a number of the whole swarm: the metrics at the end of an epoch and of an
    evaluation, and a loss in an evaluation that is no plain mean over the rows.

    Every worker must be given all the data, in the form of any input of Keras, and
    takes its share of the rows of each batch: arrays, `tf.data` (which is sharded by
    files where it reads enough of them), a `PyDataset` or a generator, which every
    worker draws all batches of. `evaluate` adds the shares up; `predict` takes all rows
    on every worker.

    A variable read outside the replicas gives the copy of the worker's first replica,
    without asking another worker.

    No TensorFlow server runs. Every worker listens at its own address of `TF_CONFIG`,
    and nowhere else, and the workers talk over connections of the swarm's own.
    What its members must know to get in is in the environment: a secret of the swarm in
    `TF_PSOPS_SECRET`, or in the file that `TF_PSOPS_SECRET_FILE` names.

    Args:
        devices: The local devices, one particle on each, such as
            `["GPU:0", "GPU:1"]`. Defaults to all GPUs of the worker, or one CPU.
        cluster_resolver: A `tf.distribute.cluster_resolver.ClusterResolver`.
            Defaults to `TF_CONFIG`; without it the swarm lives in this process.
        startup_timeout: Seconds to wait for all workers to start. Defaults to 300.
        share_gradients: Whether the gradients are averaged at every step, for
            synchronous SGD, to compare with. The swarm then stays together without
            `PSOSync`. Each device counts by its rows. Defaults to `False`.
        timeout: Seconds to wait for the other workers wherever they meet after the
            start: at a synchronisation, a metric of the whole swarm, new variables.
            It must be more than anything takes that one worker does alone, such as to
            save a model. Defaults to 1800.
        min_workers: How many workers the swarm needs to go on, at least half of all.
            A worker that is lost, or does not come within `timeout` seconds, is dropped
            by the others, and they go on; one that starts again, or late, joins at the
            next synchronisation. Of two halves that cannot reach each other, the one
            with worker 0 goes on. Defaults to `None`, all workers (or what
            `python -m tf_psops.launch --min_workers` says): a lost one is an error on
            the others.
        tls: A `tf_psops.TLS` to encrypt what travels between the workers. Defaults to
            the certificates that the environment names in `TF_PSOPS_TLS_CERTIFICATE`,
            `TF_PSOPS_TLS_KEY` and `TF_PSOPS_TLS_AUTHORITY`, or no encryption.
        particle: What a particle is: "device", each device by itself, or "worker", all
            devices of a worker together, an island: at every step TensorFlow averages
            their gradients (by NCCL on GPUs), they hold equal weights, and one vector
            for each worker takes part in synchronisations. For several GPUs in each
            machine and a slow network between the machines. Defaults to "device".

    Raises:
        ValueError: If `TF_CONFIG`, Keras' backend or an argument is not usable, or the
            workers have different ones; later, if the workers make different variables.
        OSError: If this worker cannot listen at its address of `TF_CONFIG`.
        TimeoutError: If a worker has not started after `startup_timeout` seconds, or
            later, if it has not come after `timeout` seconds.
        RuntimeError: Later, if another worker has failed or is gone.

    Example:

    ```python
    strategy = tf_psops.SwarmStrategy()
    with strategy.scope():
        model = make_model()
        model.compile(optimizer=keras.optimizers.SGD(0.05), loss="mse")
    model.fit(dataset, callbacks=[tf_psops.PSOSync(10)])
    ```
    """

    def __init__(
        self,
        devices: Sequence[str] | None = None,
        cluster_resolver: tf.distribute.cluster_resolver.ClusterResolver | None = None,
        startup_timeout: float = 300.0,
        share_gradients: bool = False,
        timeout: float = 1800.0,
        min_workers: int | None = None,
        tls: tls_lib.TLS | None = None,
        particle: Literal["device", "worker"] = "device",
    ):
        _check_backend()
        _check_devices(devices)
        _checks.check(
            isinstance(particle, str) and particle in ("device", "worker"),
            "'device' or 'worker'",
            particle=particle,
        )
        for name, value in ("startup_timeout", startup_timeout), ("timeout", timeout):
            good = _checks.is_real(value) and value > 0
            _checks.check(good, "a number of seconds above 0", **{name: value})
        self.timeout = timeout
        good = isinstance(share_gradients, bool)
        _checks.check(good, "True or False", share_gradients=share_gradients)
        good = tls is None or isinstance(tls, tls_lib.TLS)
        _checks.check(good, "a `tf_psops.TLS`, or None", tls=tls)
        if cluster_resolver is None:
            found = cluster.read_tf_config()
        else:
            _checks.check(
                isinstance(
                    cluster_resolver, tf.distribute.cluster_resolver.ClusterResolver
                ),
                "a `tf.distribute.cluster_resolver.ClusterResolver`, or None for "
                "TF_CONFIG",
                cluster_resolver=cluster_resolver,
            )
            found = cluster.read_resolver(cluster_resolver)
        others = found is None and cluster.sign_of_others()
        if others:
            logging.warning(
                "This process knows of no cluster, but %s says that others were "
                "started with it: each of them is then the chief of a swarm of its "
                "own, and writes the same files. Set TF_CONFIG in each process, as "
                "`python -m tf_psops.launch` does, or give SwarmStrategy a "
                "`cluster_resolver`, such as "
                "tf.distribute.cluster_resolver.SlurmClusterResolver().",
                others,
            )
        workers, index = found or ((None,), 0)
        min_workers = _check_min_workers(min_workers, len(workers))
        self._observers: weakref.WeakKeyDictionary[keras.Model, Any] = (
            weakref.WeakKeyDictionary()
        )
        self._written: weakref.WeakKeyDictionary[keras.Model, Any] = (
            weakref.WeakKeyDictionary()
        )
        super().__init__(
            tensorflow_internals.SwarmExtended(
                self, devices, cluster_resolver, len(workers), index, share_gradients
            )
        )
        _check_existence(devices)
        # How often `fit` has been called, and what a worker was sent that joins a later
        # one.
        self.num_fits = 0
        self.invitation = None
        # A weak reference to what takes a backup where too few workers are left.
        self.end_in_backup: Callable[[], Callable[[], None] | None] = lambda: None
        self.peers = None
        self._rows_of_logs = None  # Of the last step that returned any.
        if len(workers) > 1:
            with tf.device(self.extended.worker_devices[0]):
                self._rows_of_logs = tf.Variable(1.0, trainable=False)
            self.peers = group.shared(
                index,
                workers,
                min_workers,
                startup_timeout,
                identity={
                    "versions of tf_psops": __version__,
                    "local devices": len(self.extended.worker_devices),
                    "particles": particle,
                },
                secret=handshake.read_secret(),
                tls=tls or tls_lib.read_tls(),
            )
            tensorflow_internals.join_failures()
        num_devices = len(self.extended.worker_devices)
        self.local_replicas_per_particle = num_devices if particle == "worker" else 1
        self.collectives = Collectives(
            self.extended.worker_devices, self.peers, self.local_replicas_per_particle
        )

    @classmethod
    def in_process(cls, num_particles: int, **kwargs: Any) -> "SwarmStrategy":
        """Makes a swarm of particles inside this process, on logical CPU devices.

        It must come before anything else initialises TensorFlow's devices, unless
        there are enough logical CPU devices already. For GPUs use
        `SwarmStrategy(devices=["GPU:0", "GPU:1"])`.

        Args:
            num_particles: How many particles, at least 1.
            **kwargs: Further arguments of `SwarmStrategy`.

        Returns:
            A `SwarmStrategy` with `num_particles` replicas.

        Raises:
            ValueError: If `num_particles` is not a whole number of at least 1.
            RuntimeError: If TensorFlow is initialised with fewer CPU devices.

        Example:

        ```python
        strategy = tf_psops.SwarmStrategy.in_process(4)
        ```
        """
        good = _checks.is_whole(num_particles) and num_particles >= 1
        _checks.check(good, "a whole number of at least 1", num_particles=num_particles)
        cpu = tf.config.list_physical_devices("CPU")[0]
        configured = tf.config.get_logical_device_configuration(cpu) or ()
        logical = [tf.config.LogicalDeviceConfiguration()] * num_particles
        try:
            if len(configured) < num_particles:
                tf.config.set_logical_device_configuration(cpu, logical)
        except RuntimeError as error:  # TensorFlow's devices are initialised.
            available = len(tf.config.list_logical_devices("CPU"))
            if available < num_particles:
                raise RuntimeError(
                    f"in_process(num_particles={num_particles}) needs {num_particles} "
                    "logical CPU devices, but TensorFlow is already initialised with "
                    f"{available}. Call SwarmStrategy.in_process before anything that "
                    "makes a tensor, a variable or a model, or set the devices first "
                    "with tf.config.set_logical_device_configuration."
                ) from error
        return cls(devices=[f"CPU:{i}" for i in range(num_particles)], **kwargs)

    @property
    def num_workers(self) -> int:
        """Returns the number of worker processes, 1 for a swarm in one process."""
        return self.extended.num_workers

    @property
    def worker_index(self) -> int:
        """Returns this worker's place in the cluster; the chief has 0."""
        return self.extended.worker_index

    @property
    def num_replicas_in_sync(self) -> int:
        """Returns the number of replicas; inside `run` 1.

        Inside a replica Keras divides its own losses, and no others, by it, to sum the
        gradients over as many later. A particle trains alone, and replicas that share
        gradients average them: what is done to a loss and its gradients, such as
        clipping, must not see a part of them.
        """
        context = tf.distribute.get_replica_context()
        if context is not None and context.strategy is self:
            return 1
        return super().num_replicas_in_sync

    @property
    def is_chief(self) -> bool:
        """Tells whether this worker writes files: the lowest that is there."""
        return self.peers is None or self.peers.is_chief

    @contextlib.contextmanager
    def barrier(self, name: str) -> Iterator[None]:
        """Bounds the wait for the other workers in a `with` block that meets them.

        Another error than a lost or late worker's should arise in the block on all
        workers, if at all: nobody is told of it, unless its `is_known_to_all` says
        `False`.

        Args:
            name: What they meet for, to name it in errors.

        Raises:
            TimeoutError: If not all workers came within `timeout` seconds.
            RuntimeError: If another worker failed or is gone.
        """
        if self.peers is None:
            yield
            return
        try:
            with self.peers.barrier(name, self.timeout):
                yield
        except Exception as error:
            own = not isinstance(error, tf.errors.OpError)
            if own and not hasattr(error, "is_known_to_all"):
                tensorflow_internals.known_to_all(error)
            raise

    @contextlib.contextmanager
    def scope(self) -> Iterator["SwarmStrategy"]:
        """Makes this strategy the current one; see `tf.distribute.Strategy.scope`.

        When it ends, all workers have the chief's values of the variables made in it.
        """
        with super().scope() as strategy:
            yield strategy
        self.share_new_variables()

    def share_new_variables(self) -> None:
        """Gives all workers the chief's values of what was made since the last call."""
        made = self.extended.take_new_variables()
        if made and self.peers:
            with tf.init_scope(), self.barrier("the chief's values of new variables"):
                initial_values.share(self, made)

    def observe(
        self,
        model: keras.Model,
        observer: Callable[[Callable[..., Any]], Callable[..., Any]] | None,
    ) -> None:
        """Wraps a model's training step on every replica.

        Args:
            model: The `keras.Model` that was made in this strategy's scope.
            observer: A function that takes the train step (a function of one
                batch) and returns the function to run in its place, or `None` to
                stop observing. It counts for train functions traced from now on.
        """
        self._observers[model] = observer

    def run(
        self,
        fn: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: tf.distribute.RunOptions | None = None,
    ) -> Any:
        """Runs `fn` on every replica; see `tf.distribute.Strategy.run`."""
        # Before they are trained: a scope that is still open shares what is made in it
        # only when it ends.
        self.share_new_variables()
        trained, step = None, fn
        for model, observer in self._observers.items():
            # It may be of any sort of callable: a method, or a `tf.function`.
            if observer is not None and fn == model.train_step:
                fn, trained = observer(fn), model
                break
        fn, rows = rows_of_replicas.knowing_rows(
            self,
            fn,
            (args, kwargs),
            tensorflow_internals.of_all_rows,
            functools.partial(tensorflow_internals.LossesOfStep, step),
        )
        result = super().run(fn, args=args, kwargs=kwargs, options=options)
        if self._rows_of_logs is not None and isinstance(result, dict):
            self._rows_of_logs.assign(1.0 if rows is None else rows)
        if trained is not None:
            self._note_written(trained)
        return result

    def _note_written(self, model):
        if tf.executing_eagerly():
            self._written[model] = None
        elif self._written.setdefault(model, {}) is not None:
            graph = tf.compat.v1.get_default_graph()
            handles = tensorflow_internals.written_handles(graph)
            self._written[model].update((id(handle), handle) for handle in handles)

    def is_written(self, model: keras.Model, variable: tf.Variable) -> bool | None:
        """Tells whether a model's training step writes a variable.

        Args:
            model: A `keras.Model` that was made in this strategy's scope.
            variable: A `tf.Variable`, made in this scope or not.

        Returns:
            A bool; before a step is traced `False`, and `None` where it runs eagerly,
            so that nobody knows.
        """
        written = self._written.get(model, {})
        if written is None:
            return None
        copies = getattr(variable, "values", None) or [variable]
        return any(id(copy.handle) in written for copy in copies)

    def mean_of_logs(self, logs: Any) -> Any:
        """Returns logs of Keras with the means over the workers of all float scalars.

        Each worker counts by the rows that it had in the last step. All workers must
        call it at the same time.

        Args:
            logs: What this worker's training or test steps have returned, a dict from
                names to numbers and tensors, or anything else.
        """
        if self.peers is None or not isinstance(logs, dict):
            return logs
        scalars = {
            name: tensor
            for name, value in logs.items()
            if not tf.nest.is_nested(value)
            and (tensor := tf.convert_to_tensor(value)).dtype.is_floating
            and not tensor.shape.rank
        }
        if not scalars:
            return logs
        rows = tf.cast(self._rows_of_logs, tf.float64)
        mine = [tf.cast(value, tf.float64) for value in (*scalars.values(), 1)]
        with self.barrier("the logs of an epoch, or an evaluation"):
            *sums, total = tf.unstack(
                self.collectives.reduce(
                    tf.math.multiply_no_nan(tf.stack(mine), rows), mean=False
                )
            )
        return {
            **logs,
            **{
                name: tf.cast(summed / total, value.dtype)
                for (name, value), summed in zip(scalars.items(), sums)
            },
        }

    def reduce(self, reduce_op: Any, value: Any, axis: int | None) -> Any:
        """Reduces a value over all replicas; see `tf.distribute.Strategy.reduce`.

        A nest, which the base class refuses, is a batch of which Keras wants to
        know the shapes before training: it gets the first local replica's. Shapes
        may differ between replicas, and a collective over them would abort the
        process' collectives for good.
        """
        if tf.nest.is_nested(value):
            return tf.nest.map_structure(
                lambda v: self.experimental_local_results(v)[0], value
            )
        return super().reduce(reduce_op, value, axis)


def _check_backend():
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ValueError(
            "A swarm trains with Keras' backend 'tensorflow'. Received: "
            f"{backend!r}. Set the environment variable KERAS_BACKEND=tensorflow "
            "before Keras is imported, or change it in ~/.keras/keras.json."
        )


def _check_devices(devices):
    if devices is None:
        return
    try:
        specs = [tf.DeviceSpec.from_string(device) for device in devices]
    except (TypeError, ValueError, AttributeError):
        specs = []
    if not isinstance(devices, (list, tuple)):
        specs = []
    kinds = {spec.device_type for spec in specs}
    indices = {spec.device_index for spec in specs}
    _checks.check(
        len(kinds) == 1 and None not in kinds | indices and len(indices) == len(specs),
        "a list of different local devices of one type, such as ['GPU:0', 'GPU:1']",
        devices=devices,
    )


def _check_min_workers(min_workers, num_workers):
    """Returns how many workers a swarm needs, by the argument or the launcher."""
    if min_workers is None:
        min_workers = os.environ.get("TF_PSOPS_MIN_WORKERS", "") or num_workers
        with contextlib.suppress(ValueError):
            min_workers = int(min_workers)
    good = _checks.is_whole(min_workers) and (
        num_workers / 2 <= min_workers <= num_workers
    )
    _checks.check(
        good,
        f"a whole number from half of the {num_workers} workers, so that a split "
        "network never makes two swarms, to all of them",
        min_workers=min_workers,
    )
    return min_workers


def _check_existence(devices):
    """Raises an error if a device is not there, once TensorFlow knows its own."""
    there = [
        f"{device.device_type}:{tf.DeviceSpec.from_string(device.name).device_index}"
        for device in tf.config.list_logical_devices()
    ]
    for device in devices or ():
        spec = tf.DeviceSpec.from_string(device)
        _checks.check(
            f"{spec.device_type}:{spec.device_index}" in there,
            f"devices out of {there}, all that this process has",
            devices=devices,
        )
