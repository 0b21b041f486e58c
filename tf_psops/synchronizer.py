"""One synchronisation: what all particles bring, what travels, where they move."""

import contextlib

import numpy as np
import tensorflow as tf

from tf_psops import (
    _private_api,
    collectives,
    compiling,
    health,
    ledger,
    packing,
    transfer,
)
from tf_psops.rules import rule as rule_lib

# The calls of `Collectives`.
_BEGIN, _REPORT, _EXCHANGE, _AVERAGE, _SCORE, _HEALTH, _CLOSE, _TELL = range(8)

# What a swarm has of its past besides the particles.
_PROGRESS = ("num_syncs", "num_sick", "bytes_moved", "_sent")


class Synchronizer:
    """Moves the particles of a swarm by a rule.

    All workers must take part in `begin`, `start`, `finish`, `tell` and `close`.

    Args:
        strategy: A `SwarmStrategy`.
        model: The compiled and built `keras.Model` that was made in its scope.
        rule: A `Rule`.
        average_non_trainable: Whether non-trainable state is averaged.
        average_slots: Whether the optimizer's slots are averaged.
        payload_dtype: The name of the float type in which the vector of a
            synchronisation travels, or `None` for that of the weights.
        delayed: Whether particles may take local steps between `start` and `finish`.
    """

    def __init__(
        self,
        strategy,
        model,
        rule,
        average_non_trainable,
        average_slots,
        payload_dtype=None,
        delayed=False,
    ):
        self._rule = rule
        self._delayed = delayed
        self._under_way = None
        self._devices = strategy.extended.worker_devices
        self._collectives = collectives.Collectives(
            self._devices,
            strategy.num_workers,
            strategy.worker_index,
            strategy.communication_options,
            strategy.wire,
        )
        self._strategy = strategy
        self._model = model
        self._ledger = ledger.Ledger(strategy, model, keep_batch=rule.num_trials > 0)
        state = _private_api.updated_state(model)
        slots = _slots(model.optimizer)
        weights = model.trainable_variables
        doubles = any(v.dtype == "float64" for v in [*weights, *state, *slots])
        self._dtype = tf.float64 if doubles else tf.float32
        self._payload = tf.as_dtype(payload_dtype or self._dtype)

        def pack(*variables):
            return packing.Packing(strategy, variables, self._dtype)

        self._weights = pack(*weights)
        self._start = pack(*weights, *state)
        self._averaged = pack(
            *(state if average_non_trainable else []), *(slots if average_slots else [])
        )
        local = strategy.experimental_local_results
        self._slots = [(local(slot.value), _fresh(slot)) for slot in slots]
        self._left_apart = pack(*([] if average_non_trainable else state))
        self._state = pack(*(state if average_non_trainable else []))
        self._rule_state, self._vector, self._agreed_state = self._make_state(strategy)
        self._tensor_ids = self._on_devices(lambda _: self._weights.tensor_ids())
        self._trial = compiling.compiled(self._rule_trial)
        self._move = compiling.compiled(self._rule_move)
        self._agreed = compiling.compiled(self._rule_agreed)
        self._shorten = compiling.compiled(
            lambda position, last: tf.saturate_cast(position - last, self._payload)
        )
        self._lengthen = compiling.compiled(
            lambda way, last: last + tf.cast(way, self._dtype)
        )
        self._apart = False
        self._sent = None
        self.wish = 0
        self.num_sick = 0
        self.num_syncs = 0
        self.bytes_moved = 0

    @property
    def num_particles(self):
        """Returns W, the number of particles on all workers."""
        return self._collectives.num_particles

    @property
    def local_particles(self):
        """Returns the range of the local particles' indices."""
        first = self._collectives.first_particle
        return range(first, first + len(self._devices))

    def tell(self, row):
        """Returns what each particle's worker tells, a NumPy array [W, 3].

        Args:
            row: Three numbers of this worker, the same for all of its particles.
        """
        self._wait()
        return self._tell(tf.constant(row, tf.float64)).numpy()

    @tf.function(autograph=False)
    def _tell(self, row):
        return self._collectives.gather([row] * len(self._devices), _TELL)

    def particles(self):
        """Returns the variables that each local particle is made of, lists."""
        model, local = self._model, self._strategy.experimental_local_results
        of_keras = model.variables + model.optimizer.variables + model.metrics_variables
        copies = zip(*(local(variable.value) for variable in of_keras), strict=True)
        return [
            [
                *variables,
                *tf.nest.flatten(self._rule_state[replica]),
                self._vector[replica],
                self._agreed_state[replica],
                self._ledger.sums(replica),
            ]
            for replica, variables in enumerate(copies)
        ]

    def progress(self):
        """Returns what the synchronisations have come to, to `restore` it."""
        return {name: getattr(self, name) for name in _PROGRESS}

    def restore(self, progress, arrays, newcomers):
        """Puts the swarm back to where it was.

        Args:
            progress: A dict from `progress`.
            arrays: For each local particle the values of its variables as in
                `particles`, in a newcomer's place those of another particle.
            newcomers: Indices of the local particles that were not in the swarm. They
                start from the position that stands for it, with fresh slots.
        """
        for name in _PROGRESS:
            setattr(self, name, progress[name])
        if newcomers:
            self._sent = None
        local = self._strategy.experimental_local_results
        for replica, (variables, values) in enumerate(zip(self.particles(), arrays)):
            own = set()
            if self.local_particles[replica] in newcomers:
                # Its random seeds and slots are its own, and fresh.
                own = {id(copies[replica]) for copies, _ in self._slots} | {
                    id(local(variable.value)[replica])
                    for variable in self._model.non_trainable_variables
                    if not tf.as_dtype(variable.dtype).is_floating
                }
            for variable, value in zip(variables, values):
                if id(variable) not in own:
                    variable.assign(value)
        for newcomer in newcomers:
            self._join(newcomer - self.local_particles[0])

    def _join(self, replica):
        with tf.device(self._devices[replica]):
            position = self._agreed_position(replica)
            state = self._rule.join(
                tf.nest.map_structure(tf.identity, self._rule_state[replica]), position
            )
            _assign(self._rule_state[replica], state)
            self._weights.unpack(replica, position)
            self._state.unpack(replica, self._agreed_state[replica])

    def local_steps(self):
        """Returns the local steps of this worker's first particle, an int."""
        return self._ledger.num_steps()

    def begin(self):
        """Puts all particles on the first one's position, at rest."""
        self.num_sick = 0
        self.drop()
        if self._apart:  # An earlier training was cut short.
            self._show_agreed()
        self._begin()
        self._apart = True
        self._sent = None
        self.num_syncs = 0
        self.bytes_moved = 0

    def rehearse(self, take_mean):
        """Synchronises and closes once, and takes it back: all is then compiled.

        All workers must take part. It must come after the first local step, which the
        trial positions of a rule are scored on.

        Args:
            take_mean: See `close`.
        """
        variables = tf.nest.flatten(
            [
                *(self._rule_state, self._vector, self._agreed_state),
                *(self._start.variables, self._averaged.variables),
                self._ledger.variables,
            ]
        )
        values = [variable.read_value() for variable in variables]
        table, *brought = self._report(tf.constant(0, tf.float64))
        healthy = tf.zeros([table.shape[0]], table.dtype)
        self._begin_transfer(brought, healthy, tf.constant(0), tf.constant(True))
        self._settle(*self._end_transfer(), tf.constant(0))
        self._take_back(self._show_agreed())
        self._close(take_mean)
        for variable, value in zip(variables, values):
            variable.assign(value)

    def rest(self):
        """Makes what the particles have now, all the same, what was agreed on.

        For weights that the user has set. No collective runs.
        """
        self.drop()
        self._rest_all()
        self._sent = None

    def close(self, take_mean):
        """Puts all particles on the position that stands for the swarm.

        Args:
            take_mean: Whether that is the mean of the positions as they are now, for
                weights that are moving averages, and not what the rule agreed on.
        """
        finite = self._close(take_mean)
        self._apart = False
        self._check_finite(finite, "agreed")
        if take_mean:
            self.num_syncs += 1
            self.bytes_moved += self._weights.size * self._dtype.size

    @contextlib.contextmanager
    def agreed(self):
        """Puts the position that stands for the swarm in place of the particles' own.

        It is the one that the last synchronisation left, on every worker the same; no
        collective runs. On leaving, each particle gets its own back. Inside `agreed`,
        and outside of training, nothing changes hands.
        """
        if not self._apart:
            yield
            return
        own = self._show_agreed()
        self._apart = False
        try:
            yield
        finally:
            self._take_back(own)
            self._apart = True

    def any_worker(self, flag):
        """Returns whether any worker gave `True`, on all workers the same."""
        return bool(self.tell([flag, 0, 0])[:, 0].any())

    def synchronize(self, wish=0):
        """Moves all particles once; see `start` and `finish`."""
        self.start(wish)
        return self.finish()

    @property
    def is_under_way(self):
        """Returns whether a synchronisation has been started and not finished."""
        return self._under_way is not None

    def start(self, wish=0):
        """Lets what the particles bring to a synchronisation travel.

        Args:
            wish: A number that this worker tells the others. The largest of all is then
                in `wish`.

        Raises:
            FloatingPointError: If no particle is in good health.
            RuntimeError: If the particles are not at the same step.
        """
        table, *brought = self._report(tf.constant(wish, tf.float64))
        fitness, scores, steps, distances, wishes = table.numpy().T
        self.wish = int(wishes.max())
        self._check_steps(steps)
        if not np.isfinite(fitness).any():
            raise FloatingPointError(
                "No particle has a finite training loss and finite weights at "
                f"synchronisation {self.num_syncs}. Received the losses "
                f"{fitness.tolist()}. Lower the learning rate, or clip the gradients."
            )
        sick = health.are_sick(fitness, distances)
        self.num_sick += int(sick.sum())
        fitness = np.where(sick, np.inf, fitness)
        root = int(np.where(sick, np.inf, scores).argmin())
        news = (root, float(scores[root]))
        self._begin_transfer(
            brought,
            tf.constant(fitness),
            tf.constant(root),
            tf.constant(news != self._sent),
        )
        scores = self._rule.num_trials and 1 + self._rule.num_trials
        scalars = (table.shape[1] + scores) * self.num_particles
        self.bytes_moved += scalars * table.dtype.size
        self.bytes_moved += self._averaged.size * self._dtype.size
        if self._rule.exchange == "mean" or news != self._sent:
            self.bytes_moved += self._weights.size * self._payload.size
        self._sent = news

    def finish(self):
        """Waits for what travels, and moves the particles by it.

        A particle that has gone on since `start` keeps that way, from where it is put.

        Returns:
            The fitness of every particle, a NumPy array [W].

        Raises:
            FloatingPointError: If the rule gives a position that is not finite.
        """
        settled = self._end_transfer()
        self._check_finite(self._settle(*settled, tf.constant(self.num_syncs)), "move")
        self.num_syncs += 1
        return settled[0].numpy()

    def drop(self):
        """Forgets a synchronisation that is under way; its transfer ends first."""
        if self.is_under_way:
            self._end_transfer()

    def _begin_transfer(self, brought, fitness, root, is_news):
        positions, offers, states, own = brought
        moving = transfer.Transfer(
            lambda: self._travel(offers, own, fitness, root, is_news),
            in_background=self._delayed,
        )
        self._under_way = (fitness, positions, states, own), moving

    def _end_transfer(self):
        (known, moving), self._under_way = self._under_way, None
        return *known, *moving.result()

    def _wait(self):
        """Waits for what travels: nothing else may meanwhile."""
        if self.is_under_way:
            self._under_way[1].result()

    def meet(self):
        """Makes sure that, in training, all workers end an epoch or evaluate at once.

        Raises:
            RuntimeError: If another one is at a synchronisation or at another step.
        """
        if self._apart and self._strategy.num_workers > 1:
            with self._strategy.meeting("the end of an epoch, or an evaluation"):
                self._wait()
                self._check_steps(self._meet().numpy()[:, 2])

    def _check_steps(self, steps):
        if steps.min() != steps.max():
            met = [
                f"{int(step)}{' (end of epoch, or evaluation)' if step % 1 else ''}"
                for step in steps
            ]
            raise RuntimeError(
                f"The particles met for synchronisation {self.num_syncs} after "
                f"different numbers of local steps: [{', '.join(met)}], in the order "
                "of the particles. Expected the same number. Give every worker a "
                "dataset of as many batches, and call `evaluate` on all workers."
            )

    def _check_finite(self, finite, function):
        """Raises an error if what the rule made of finite positions is not finite."""
        sick = self._collectives.first_particle + np.flatnonzero(~np.array(finite))
        if sick.size:
            error = FloatingPointError(
                f"The rule {type(self._rule).__name__} gave particles {sick.tolist()} "
                "a position that is not finite, at synchronisation "
                f"{self.num_syncs}, from `{function}`. Expected finite weights. Look "
                "for a division by zero, a root or a logarithm in the rule, or take a "
                "rule of tf_psops."
            )
            error.is_known_to_all = False  # Only to the worker of the particle.
            raise error

    def _make_state(self, strategy):
        """Returns what the local replicas remember of the last synchronisation.

        The rule's states, the vectors that travelled, and the non-trainable state
        that was averaged.
        """
        position = tf.zeros([self._weights.size], self._dtype)
        state = self._rule.init(position)
        rule_lib.check_state(self._rule, state)
        with strategy.scope():
            state = tf.nest.map_structure(
                lambda value: tf.Variable(tf.zeros_like(value), trainable=False), state
            )
            vector = tf.Variable(position, trainable=False)
            averaged = tf.zeros([self._state.size], self._dtype)
            averaged = tf.Variable(averaged, trainable=False)
        local = [
            tf.nest.map_structure(
                lambda variable, replica=replica: strategy.experimental_local_results(
                    variable
                )[replica],
                state,
            )
            for replica in range(len(self._devices))
        ]
        results = strategy.experimental_local_results
        return local, results(vector), results(averaged)

    @tf.function(autograph=False)
    def _begin(self):
        starts = self._collectives.broadcast(
            self._on_devices(self._start.pack), tf.constant(0), _BEGIN
        )

        def begin(replica):
            self._start.unpack(replica, starts[replica])
            self._rest(replica)
            self._ledger.begin(replica)

        self._on_devices(begin)

    @tf.function(autograph=False)
    def _rest_all(self):
        self._on_devices(self._rest)

    def _rest(self, replica):
        """Makes a replica's position what was agreed on, without a velocity."""
        position = self._weights.pack(replica)
        self._vector[replica].assign(position)
        _assign(self._rule_state[replica], self._rule.init(position))
        self._agreed_state[replica].assign(self._state.pack(replica))

    @tf.function(autograph=False)
    def _report(self, wish):
        """Returns a table of all particles, and what the local ones bring.

        The table, [W, 5], has their fitness, score, steps, distance from the vector
        that travelled last, and what their worker wishes. Then come
        positions, offers, the rule's new states, and the state to be averaged.
        """

        def report(replica):
            position = self._weights.pack(replica)
            loss = tf.cast(self._ledger.mean_loss(replica), position.dtype)
            # Not finite either where an element of the position is not.
            distance = health.distance(position, self._vector[replica].read_value())
            sound = tf.math.is_finite(loss) & tf.math.is_finite(distance)
            fitness = tf.where(sound, loss, float("inf"))
            before = self._rule_state[replica]
            returned = self._rule.offer(before, position, fitness)
            rule_lib.check_returned(
                self._rule, "offer", returned, (before, rule_lib.Offer(position, loss))
            )
            state, offer = returned
            score = tf.where(tf.math.is_finite(offer.score), offer.score, float("inf"))
            row = [tf.cast(value, tf.float64) for value in (fitness, score)]
            row += [self._ledger.steps(replica), tf.cast(distance, tf.float64)]
            row += [wish]
            row = tf.stack(row)
            with tf.control_dependencies([row]):
                self._ledger.close(replica)
            return row, position, offer.vector, state, self._averaged.pack(replica)

        rows, *brought = zip(*self._on_devices(report))
        return self._collectives.gather(rows, _REPORT), *brought

    @tf.function(autograph=False)
    def _meet(self):
        """Returns a table as of `_report`, with half a step more."""

        def report(replica):
            return tf.stack([0.0, 0.0, self._ledger.steps(replica) + 0.5, 0.0, 0.0])

        return self._collectives.gather(self._on_devices(report), _REPORT)

    @tf.function(autograph=False)
    def _travel(self, offers, own, fitness, root, is_news):
        """Returns the vector that travels, and the mean of the state of the particles.

        Both are lists with one for each device. It must not read what training writes.
        """
        healthy = tf.math.is_finite(fitness)
        mean = self._collectives.mean
        rounded = self._payload != self._dtype
        if self._rule.exchange == "mean" and not rounded:
            return self._mean_of_both(offers, own, healthy, _EXCHANGE)
        averaged = mean(own, healthy, _AVERAGE) if self._averaged.size else own
        last = [vector.read_value() for vector in self._vector]
        if rounded:  # What travels is the way from the last one, which is short.
            offers = self._on_devices(lambda r: self._shorten(offers[r], last[r]))
        if self._rule.exchange == "mean":
            vectors = mean(offers, healthy, _EXCHANGE)
        else:
            vectors = tf.cond(
                is_news,
                lambda: self._collectives.broadcast(offers, root, _EXCHANGE),
                lambda: [
                    tf.zeros_like(offer) if rounded else tf.identity(vector)
                    for offer, vector in zip(offers, last)
                ],
            )
        if rounded:
            vectors = self._on_devices(lambda r: self._lengthen(vectors[r], last[r]))
        return vectors, averaged

    @tf.function(autograph=False)
    def _settle(self, fitness, positions, states, own, vectors, averaged, sync):
        """Moves the local particles by what travelled.

        Returns whether the rule gave each of them a finite position.
        """
        first = self._collectives.first_particle
        mine = tf.math.is_finite(fitness)[first:]
        # What a sick particle remembers is from before it was sick.
        states = [
            tf.nest.map_structure(
                lambda new, variable, good=mine[replica]: tf.cond(
                    good, lambda: tf.identity(new), variable.read_value
                ),
                states[replica],
                self._rule_state[replica],
            )
            for replica in range(len(self._devices))
        ]

        def way(replica, packing, start):
            """Returns how far a particle has gone on since the start."""
            return tf.cond(
                mine[replica],
                lambda: packing.pack(replica) - start,
                lambda: tf.zeros_like(start),
            )

        if self._delayed:
            ways = self._on_devices(lambda r: way(r, self._weights, positions[r]))

        def learn(replica):
            gone = way(replica, self._averaged, own[replica]) if self._delayed else 0
            self._vector[replica].assign(vectors[replica])
            self._averaged.unpack(replica, averaged[replica])
            self._agreed_state[replica].assign(self._state.pack(replica))
            if self._delayed:
                self._averaged.unpack(replica, averaged[replica] + gone)
            news = rule_lib.News(
                vector=vectors[replica],
                fitness=tf.cast(fitness, self._dtype),
                particle=first + replica,
                sync=sync,
            )
            factors = self._rule.factors(news, len(self._weights.sizes))
            return news._replace(factors=factors)

        news = self._on_devices(learn)
        if self._rule.num_trials:
            scores = tf.cast(self._score_trials(states, news), self._dtype)
            news = [n._replace(scores=scores) for n in news]

        def move(replica):
            # A sick particle starts from what travelled, with fresh slots.
            position = tf.cond(
                mine[replica],
                lambda: tf.identity(positions[replica]),
                lambda: self._heal(replica, vectors[replica]),
            )
            state, position = self._move(
                states[replica], position, news[replica], self._tensor_ids[replica]
            )
            _assign(self._rule_state[replica], state)
            finite = health.is_finite(position)
            if self._delayed:
                position += ways[replica]
            self._weights.unpack(replica, position)
            return finite

        return self._on_devices(move)

    def _heal(self, replica, vector):
        for variables, fresh in self._slots:
            value = tf.fill(variables[replica].shape, fresh)
            variables[replica].assign(tf.cast(value, variables[replica].dtype))
        return tf.identity(vector)

    def _mean_of_both(self, positions, others, healthy, call):
        """Returns the mean positions and the mean of other vectors by one transfer."""
        if not others[0].shape[0]:
            return self._collectives.mean(positions, healthy, call), others
        both = [tf.concat(pair, axis=0) for pair in zip(positions, others)]
        means = self._collectives.mean(both, healthy, call)
        size = self._weights.size
        return [mean[:size] for mean in means], [mean[size:] for mean in means]

    def _score_trials(self, states, news):
        """Returns the mean loss over the swarm of what travelled and each trial."""

        def loss():
            batch = self._ledger.batch(self._strategy.local_replica())
            return _private_api.test_loss(self._model, batch)

        def score(number, scores):
            def unpack(replica):
                arguments = states[replica], news[replica], self._tensor_ids[replica]
                position = tf.cond(
                    number == 0,
                    lambda: tf.identity(news[replica].vector),
                    lambda: self._trial(number - 1, *arguments),
                )
                self._weights.unpack(replica, position)

            self._on_devices(unpack)
            losses = self._strategy.experimental_local_results(self._strategy.run(loss))
            row = tf.stack([tf.cast(loss, tf.float64) for loss in losses])
            return number + 1, scores.write(number, row)

        count = 1 + self._rule.num_trials
        _, scores = tf.while_loop(
            lambda number, _: number < count,
            score,
            (tf.constant(0), tf.TensorArray(tf.float64, count)),
            parallel_iterations=1,
        )
        rows = tf.unstack(tf.transpose(scores.stack()), len(self._devices))
        table = self._collectives.gather(rows, _SCORE)
        table = tf.where(tf.math.is_finite(table), table, float("inf"))
        return tf.reduce_mean(table, axis=0)

    def _agreed_position(self, replica):
        state, vector = self._rule_state[replica], self._vector[replica]
        return self._agreed(
            tf.nest.map_structure(tf.identity, state), vector.read_value()
        )

    @tf.function(autograph=False)
    def _show_agreed(self):
        """Shows what was agreed on, and returns what the local replicas had."""

        def show(replica):
            own = self._weights.pack(replica), self._state.pack(replica)
            self._weights.unpack(replica, self._agreed_position(replica))
            self._state.unpack(replica, self._agreed_state[replica])
            return own

        return self._on_devices(show)

    @tf.function(autograph=False)
    def _take_back(self, own):
        def take(replica):
            position, state = own[replica]
            self._weights.unpack(replica, position)
            self._state.unpack(replica, state)

        self._on_devices(take)

    @tf.function(autograph=False)
    def _close(self, take_mean):
        positions = self._on_devices(
            self._weights.pack if take_mean else self._agreed_position
        )
        states = self._on_devices(self._left_apart.pack)
        if take_mean or self._left_apart.size:
            finite = [
                tf.reduce_all(tf.math.is_finite(position))
                & tf.reduce_all(tf.math.is_finite(state))
                for position, state in zip(positions, states)
            ]
            rows = [tf.cast([flag], tf.float64) for flag in finite]
            healthy = self._collectives.gather(rows, _HEALTH)[:, 0] > 0
            positions, states = self._mean_of_both(positions, states, healthy, _CLOSE)

        def take(replica):
            self._weights.unpack(replica, positions[replica])
            self._left_apart.unpack(replica, states[replica])
            return health.is_finite(positions[replica])

        return self._on_devices(take)

    def _rule_trial(self, number, state, news, tensor_ids):
        tensor_ids = tf.cast(tensor_ids, tf.int32)
        position = self._rule.trial(number, state, news, tensor_ids)
        rule_lib.check_returned(self._rule, "trial", position, news.vector)
        return position

    def _rule_move(self, state, position, news, tensor_ids):
        tensor_ids = tf.cast(tensor_ids, tf.int32)
        returned = self._rule.move(state, position, news, tensor_ids)
        rule_lib.check_returned(self._rule, "move", returned, (state, position))
        return returned

    def _rule_agreed(self, state, vector):
        position = self._rule.agreed(state, vector)
        rule_lib.check_returned(self._rule, "agreed", position, vector)
        return position

    def _on_devices(self, function):
        results = []
        for replica, device in enumerate(self._devices):
            with tf.device(device):
                results.append(function(replica))
        return results


def _fresh(slot):
    """Returns the number that a slot holds before training, 0 after it has begun."""
    values = slot.numpy().ravel()
    return float(values[0]) if values.size and (values == values[0]).all() else 0.0


def _assign(variables, values):
    tf.nest.map_structure(lambda variable, v: variable.assign(v), variables, values)


def _slots(optimizer):
    """Returns the optimizer's slots: its float variables but the learning rate."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return [
        variable
        for variable in optimizer.variables
        if tf.as_dtype(variable.dtype).is_floating and variable.name != "learning_rate"
    ]
