"""The strategy whose replicas are the particles of a swarm."""

import functools
import weakref

import tensorflow as tf
from absl import logging

from tf_psops import _checks, cluster, tensorflow_internals
from tf_psops.transport import barrier, collectives, connections, equality


class SwarmStrategy(tf.distribute.Strategy):
    """Trains every replica apart from the others: each is one particle of a swarm.

    It is `tf.distribute.MultiWorkerMirroredStrategy` without the mirror: the same
    `TF_CONFIG` cluster and the same sharding of a global batch over the replicas,
    but every replica has its own weights, optimizer slots and non-trainable state,
    and its gradients never leave it. All replicas start from the chief's weights;
    only the random layers (dropout, augmentation) differ from replica to replica.
    Between two synchronisations by `tf_psops.PSOSync` no collective runs, except
    where Keras itself asks for a number of the whole swarm: the metrics at the end
    of an epoch and of an evaluation.

    Every worker must be given all the data, in the form of any input of Keras, and
    takes its share of the rows of each batch: arrays, `tf.data` (which is sharded by
    files where it reads enough of them), a `PyDataset` or a generator, which every
    worker draws all batches of. `evaluate` adds the shares up; `predict` takes all rows
    on every worker.

    A variable read outside the replicas gives the copy of the worker's first
    replica, without asking another worker.

    Args:
        devices: The local devices, one particle on each, such as
            `["GPU:0", "GPU:1"]`. Defaults to all GPUs of the worker, or one CPU.
        cluster_resolver: A `tf.distribute.cluster_resolver.ClusterResolver`.
            Defaults to one that reads `TF_CONFIG`; without `TF_CONFIG` the swarm
            lives in this process.
        communication_options: A `tf.distribute.experimental.CommunicationOptions`:
            its implementation (ring, NCCL) holds for all collectives. Automatic, the
            default, moves vectors between CPUs over TCP connections of the swarm's own,
            at ports that the system chooses, where all workers can reach each other.
        startup_timeout: Seconds to wait for all workers to start. Defaults to 300.
        timeout: Seconds to wait for the other workers wherever they meet after the
            start: at a synchronisation, a metric of the whole swarm, a new variable.
            It must be more than anything takes that one worker does alone, such as to
            save a model. Inside a step with `share_gradients` only the time-out of
            `communication_options` holds, for which TensorFlow keeps a thread for
            each collective. Defaults to 1800.
        share_gradients: Whether the gradients are all-reduced at every step, for
            synchronous SGD, to compare with. The swarm then stays together without
            `PSOSync`. Defaults to `False`.

    Raises:
        ValueError: If `TF_CONFIG`, `devices` or a time-out is not usable; later, if the
            workers make different variables.
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
        devices=None,
        cluster_resolver=None,
        communication_options=None,
        startup_timeout=300.0,
        share_gradients=False,
        timeout=1800.0,
    ):
        _check_devices(devices)
        for name, value in ("startup_timeout", startup_timeout), ("timeout", timeout):
            good = _checks.is_real(value) and value > 0
            _checks.check(good, "a number of seconds above 0", **{name: value})
        self.timeout = timeout
        good = isinstance(share_gradients, bool)
        _checks.check(good, "True or False", share_gradients=share_gradients)
        if cluster_resolver is None:
            worker = cluster.read_tf_config()
            if worker is not None and not worker.is_chief:
                # TensorFlow 2.19 may wait for a missing first worker for ever.
                cluster.wait_until_reachable(worker.workers[0], startup_timeout)
            cluster_resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
        if communication_options is None:
            communication_options = tf.distribute.experimental.CommunicationOptions()
        _checks.check(
            isinstance(
                cluster_resolver, tf.distribute.cluster_resolver.ClusterResolver
            ),
            "a `tf.distribute.cluster_resolver.ClusterResolver`, or None for TF_CONFIG",
            cluster_resolver=cluster_resolver,
        )
        _checks.check(
            # Its class makes objects of another one.
            hasattr(communication_options, "timeout_seconds"),
            "a `tf.distribute.experimental.CommunicationOptions`",
            communication_options=communication_options,
        )
        self._observers = weakref.WeakKeyDictionary()
        try:
            extended = tensorflow_internals.SwarmExtended(
                self,
                devices,
                cluster_resolver,
                communication_options,
                startup_timeout,
                share_gradients,
            )
        except (tf.errors.DeadlineExceededError, tf.errors.UnavailableError) as error:
            raise TimeoutError(
                f"Not all workers started within startup_timeout={startup_timeout} "
                f"seconds. Expected every worker of TF_CONFIG's cluster "
                f"({cluster_resolver.cluster_spec().as_dict()}) to run and to be "
                "reachable. Start the missing ones, or wait longer with "
                f"`startup_timeout`. TensorFlow said: {error}"
            ) from error
        super().__init__(extended)
        _check_existence(devices)
        self.communication_options = communication_options
        self._equality = equality.Equality(self)
        if self.num_workers > 1:
            barrier.tell_of_failures()

    @classmethod
    def in_process(cls, num_particles, **kwargs):
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
    def num_workers(self):
        """Returns the number of worker processes, 1 for a swarm in one process."""
        return self.extended.num_workers

    @property
    def worker_index(self):
        """Returns this worker's place in the cluster; the chief has 0."""
        return self.extended.worker_index

    @property
    def num_replicas_in_sync(self):
        """Returns the number of particles; inside `run`, of those that share gradients.

        Inside a replica Keras divides the loss by it, to sum the gradients over as many
        later. A particle trains alone: what is done to its loss and its gradients
        before that sum, such as clipping, must not see a part of them.
        """
        context = tf.distribute.get_replica_context()
        if context is not None and context.strategy is self:
            return self.extended.replicas_per_particle
        return super().num_replicas_in_sync

    def meeting(self, name):
        """Bounds the wait for the other workers; see `meeting.meeting`."""
        return barrier.meeting(self, name)

    def check_same(self, occasion, settings, name=""):
        """Raises an error unless all workers agree; see `agreement.Equality.check`."""
        self._equality.check(occasion, settings, name)

    @functools.cached_property
    def wire(self):
        """The `wire.Wire` that vectors take to the other workers, `None` without one.

        All workers must ask for it at the same time first, in a `meeting`: when they
        make their first variable.
        """
        automatic = tf.distribute.experimental.CommunicationImplementation.AUTO
        device = tf.DeviceSpec.from_string(self.extended.worker_devices[0])
        if (
            self.num_workers == 1
            or device.device_type != "CPU"
            or self.communication_options.implementation != automatic
        ):
            return None
        connected = connections.connect(
            self.worker_index,
            self.extended.hosts,
            lambda row: collectives.tell(self, row),
        )
        if connected is None:
            logging.warning(
                "The workers of %s cannot reach each other but at the ports of the "
                "cluster. They synchronise by TensorFlow's collectives, which takes "
                "about twice as long. Open the other ports between them.",
                self.extended.hosts,
            )
        return connected

    def end_collectives(self, message):
        """Ends what joins the workers, now and later, on all of them with an error."""
        self.extended.end_collectives(message)
        if vars(self).get("wire"):
            self.wire.cut()

    @property
    def is_cut_off(self):
        """Returns whether the wire to the other workers has been cut."""
        return bool(vars(self).get("wire") and self.wire.is_cut)

    def observe(self, model, observer):
        """Wraps a model's training step on every replica.

        Args:
            model: The `keras.Model` that was made in this strategy's scope.
            observer: A function that takes the train step (a function of one
                batch) and returns the function to run in its place, or `None` to
                stop observing. It counts for train functions traced from now on.
        """
        self._observers[model] = observer

    def run(self, fn, args=(), kwargs=None, options=None):
        """Runs `fn` on every replica; see `tf.distribute.Strategy.run`."""
        for model, observer in self._observers.items():
            # It may be of any sort of callable: a method, or a `tf.function`.
            if observer is not None and fn == model.train_step:
                fn = observer(fn)
                break
        return super().run(fn, args=args, kwargs=kwargs, options=options)

    def reduce(self, reduce_op, value, axis):
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
