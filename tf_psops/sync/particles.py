"""The particles of one worker: what they are made of, and what they remember."""

import functools
import zlib

import numpy as np
import tensorflow as tf

from tf_psops import _zeros
from tf_psops.sync import flattening
from tf_psops.sync.second_moments import SecondMoments


class Particles:
    """Holds the variables of the local particles, of one device or of all of them.

    Args:
        strategy: A `SwarmStrategy`.
        state: The `ModelState` of a model that was made in its scope.
        rule: A `CompiledRule`.
        first: The index of the first of them in the swarm.
        average_non_trainable: Whether state that training moves is averaged.
        average_slots: Whether the optimizers' slots are averaged.
        average_averages: Whether their moving averages of weights are.
        rescale_moments: Whether the second moments among the slots are rescaled.

    Attributes:
        dtype: The `tf.DType` of all vectors.
        indices: The range of their indices in the swarm.
        weights: The `Flattening` of the positions, [P].
        averaged: The `Flattening` of what is averaged beside them.
        left_apart: The `Flattening` of what is averaged only at the end.
        moved: The `Flattening` of all that training moves but weights and slots.
        rule_state: For each of them the variables of what its rule remembers.
        vector: For each of them the variable, [P], of what `keep` keeps.
    """

    def __init__(
        self,
        strategy,
        state,
        rule,
        first,
        average_non_trainable,
        average_slots,
        average_averages,
        rescale_moments,
    ):
        self._strategy = strategy
        self._model_state = state
        self._rule = rule
        self._devices = strategy.extended.worker_devices
        self._replicas = strategy.local_replicas_per_particle
        self.indices = range(first, first + len(self._devices) // self._replicas)
        every = [*state.weights, *state.state, *state.slots]
        doubles = any(variable.dtype == tf.float64 for variable in every)
        self.dtype = tf.float64 if doubles else tf.float32

        def pack(*variables):
            return flattening.Flattening(strategy, variables, self.dtype)

        averages = [average for _, average in state.averages]
        agreed = state.moved if average_non_trainable else []
        agreed_averages = averages if average_averages or average_slots else []
        self.weights = pack(*state.weights)
        self.averaged = pack(
            *agreed, *agreed_averages, *(state.slots if average_slots else [])
        )
        if rescale_moments:
            # Keras has no other mark of them than this name.
            moments = [slot for slot in state.slots if "velocity:" in slot.name]
            self.averaged = flattening.Joined(
                self.averaged, SecondMoments(strategy, moments, self.dtype)
            )
        self.moved = pack(*state.moved, *averages)
        moved = set(map(id, state.moved))
        self._still = [v for v in state.state if id(v) not in moved]
        self.left_apart = pack(
            *([] if average_non_trainable else state.moved),
            *([] if agreed_averages else averages),
        )
        self._state = pack(*agreed)
        # Two of the same order: a weight and its moving average have the same shape.
        self._averages = pack(*agreed_averages)
        self._averaged_weights = pack(
            *(weight for weight, _ in state.averages if agreed_averages)
        )
        self._all_averages = pack(*averages)
        self._all_averaged_weights = pack(*(weight for weight, _ in state.averages))
        self._slots = [
            (self._copies(slot), fresh)
            for slot, fresh in zip(state.slots, state.fresh, strict=True)
        ]
        self._start = {}
        self._heeds_what_is_set = False
        self._set = {}
        self._set_while_shown = None
        self._make_memory()
        for variable in (*state.weights, *state.state):
            variable.watchers.add(self)

    def _make_memory(self):
        """Makes what particles remember: the rule's state, and what was agreed on."""
        position = tf.TensorSpec([self.weights.size], self.dtype)
        # Traced only: of long vectors there should be no more than needed.
        init = tf.function(self._rule.init, autograph=False)
        memory = (
            position,
            tf.TensorSpec([self._state.size], self.dtype),
            tf.TensorSpec([self._averages.size], self.dtype),
            # The last, of which backups let go first: the next move is in its memory.
            init.get_concrete_function(position).structured_outputs,
        )

        def make(replica):
            del replica
            # Variables share the memory of a tensor that they begin with. `rest` or
            # `take_over` fills it.
            empty = functools.cache(tf.raw_ops.Empty)

            def variable(spec):
                shape = tuple(spec.shape)
                return tf.Variable(
                    empty(shape=shape, dtype=spec.dtype), trainable=False
                )

            with self._strategy.extended.plain_variables():
                return tf.nest.map_structure(variable, memory)

        self._memories = self.each(make)
        self.vector, self._agreed_state, self._agreed_averages, self.rule_state = zip(
            *self._memories
        )

    def tensor_ids(self, replica):
        """Returns the numbers, [P], of the tensors of the weights."""
        with tf.init_scope(), tf.device(self._devices[replica]):
            return self.weights.tensor_ids()

    def place(self, replica):
        """Returns the place among the local particles of the one of a replica."""
        return replica // self._replicas

    def replicas(self, place):
        """Returns the range of the replicas that a local particle is made of."""
        return range(place * self._replicas, (place + 1) * self._replicas)

    def share(self, vectors):
        """Returns for each replica the mean of a vector over those of its particle."""
        if self._replicas == 1:
            return vectors
        means = []
        for place in range(len(self.indices)):
            own = [vectors[replica] for replica in self.replicas(place)]
            means += [tf.add_n(own) / len(own)] * len(own)
        return means

    def each(self, function):
        """Returns what a function of each replica, 0, 1, ..., makes on its device."""
        results = []
        for replica, device in enumerate(self._devices):
            with tf.device(device):
                results.append(function(replica))
        return results

    def that_may_differ(self, everything):
        """Returns variables that may differ between workers when training closes.

        Args:
            everything: Whether any of them may, and not only what training leaves
                alone.
        """
        if everything:
            return [*self._model_state.weights, *self._model_state.state]
        return self._still

    def counts(self):
        """Returns the variables of state that have no mean."""
        return self._model_state.counts

    def forget_training(self):
        """Gives all particles what was agreed on, and begun with where nothing was."""
        self._show_all()
        for variable in self._model_state.moved:
            value = self._start.get(id(variable))
            if value is not None:
                for copy in self._copies(variable):
                    copy.assign(value)
        self.each(self.restart_averages)

    def take_first(self, variables):
        """Gives all local particles the first one's values of some variables."""
        for variable in variables:
            first, *others = self._copies(variable)
            for copy in others:
                copy.assign(first.read_value())

    def digests(self, variables):
        """Returns for each replica a number for each of some variables.

        They are equal where all of the values are.
        """
        copies = list(map(self._copies, variables))
        return [
            np.array([_digest(own[replica]) for own in copies], float)
            for replica in range(len(self._devices))
        ]

    def flat(self, variables):
        """Returns a `Flattening` of some variables."""
        return flattening.Flattening(self._strategy, variables, self.dtype)

    def _copies(self, variable):
        return self._strategy.experimental_local_results(variable)

    def variables(self):
        """Returns the variables that each particle is made of, lists."""
        copies = list(zip(*map(self._copies, self._model_state.variables), strict=True))
        return [
            [
                variable
                for replica in self.replicas(place)
                for variable in (
                    *copies[replica],
                    *tf.nest.flatten(self._memories[replica]),
                )
            ]
            for place in range(len(self.indices))
        ]

    def changed(self):
        """Returns a nest of all variables that a synchronisation may change."""
        changed = self.weights, self.moved, self.averaged
        return self._memories, [flat.variables for flat in changed]

    def note_start(self):
        """Keeps what the particles have now, all the same, for those that come after.

        Training will show which of it is state that it moves.
        """
        known = set(map(id, self._state.order))
        self._start = {
            id(variable): self._copies(variable)[0].read_value()
            for variable in self._model_state.state
            if id(variable) not in known
        }

    def take_over(self, previous):
        """Goes on from what the particles of the same model remember.

        Args:
            previous: Other `Particles`, of fewer variables.
        """
        known = previous.agreed_values()
        alone = {id(variable) for variable in self._model_state.moved}
        alone -= set(map(id, self._state.order))
        self._start = {key: value for key, value in known.items() if key in alone}
        self._heeds_what_is_set = previous._heeds_what_is_set
        self._set = previous._set

        def agreed(variable):
            value = known.get(id(variable))
            return self._copies(variable)[0] if value is None else value

        state = self._state.join([agreed(v) for v in self._state.order])
        averages = self._averages.join([agreed(v) for v in self._averages.order])

        def take(replica):
            self.vector[replica].assign(previous.vector[replica])
            self.remember(replica, previous.state(replica))
            self._agreed_state[replica].assign(state)
            self._agreed_averages[replica].assign(averages)

        self.each(take)

    def agreed_values(self):
        """Returns by the `id` of a state variable what was agreed on, or begun with."""
        values = dict(self._start)
        for flat, agreed in (
            (self._state, self._agreed_state),
            (self._averages, self._agreed_averages),
        ):
            if flat.size:
                parts = flat.cut(agreed[0].read_value())
                values.update(zip(map(id, flat.order), parts))
        return values

    def note_set(self, variable):
        """Keeps what user code has set a variable to, outside of the replicas.

        It holds, against what was agreed on, until the next synchronisation.
        """
        if not self._heeds_what_is_set:
            return
        values = [copy.read_value() for copy in self._copies(variable)]
        self._set[id(variable)] = variable, values
        if self._set_while_shown is not None:
            self._set_while_shown[id(variable)] = variable, values

    def assign_set(self):
        """Sets again what user code has set since the last synchronisation.

        Returns:
            Whether there was anything.
        """
        self._assign(self._set)
        return bool(self._set)

    def forget_set(self):
        """Forgets what was set before now."""
        self._set = {}

    def heed_what_is_set(self, heeds):
        """Says whether what is set from now on has to hold against what is agreed on.

        Args:
            heeds: A bool.
        """
        self._heeds_what_is_set = heeds
        self._set, self._set_while_shown = {}, None

    def _assign(self, noted):
        for variable, values in noted.values():
            for copy, value in zip(self._copies(variable), values, strict=True):
                copy.assign(value)

    def restore(self, arrays, newcomers):
        """Gives the particles the values of others of the same model.

        Args:
            arrays: For each particle the values of its `variables`, in a newcomer's
                place those of another particle.
            newcomers: Indices of those that were not in the swarm. They start from the
                position that stands for it, with fresh slots.
        """
        self.forget_set()
        for place, (variables, values) in enumerate(zip(self.variables(), arrays)):
            own = set()
            if self.indices[place] in newcomers:
                # Its random seeds, slots and metrics are its own, and fresh.
                fresh = [copies for copies, _ in self._slots]
                fresh += map(self._copies, self._model_state.seeds)
                fresh += map(self._copies, self._model_state.metrics)
                own = {
                    id(copies[replica])
                    for copies in fresh
                    for replica in self.replicas(place)
                }
            for variable, value in zip(variables, values):
                if id(variable) not in own:
                    variable.assign(value)
        for newcomer in newcomers:
            for replica in self.replicas(newcomer - self.indices[0]):
                self._join(replica)

    def _join(self, replica):
        with tf.device(self._devices[replica]):
            position = self.agreed_position(replica)
            self.remember(replica, self._rule.join(self.state(replica), position))
            self._show(replica, position)
            self.heal(replica)

    def state(self, replica):
        """Returns what a particle's rule remembers."""
        return tf.nest.map_structure(tf.identity, self.rule_state[replica])

    def remember(self, replica, state):
        """Replaces what a particle's rule remembers."""
        tf.nest.map_structure(
            lambda variable, value: variable.assign(value),
            self.rule_state[replica],
            state,
        )

    def take_averaged(self, replica, averaged):
        """Takes the averaged state that travelled for a particle's own."""
        self.averaged.unpack(replica, averaged)
        self._note_agreed(replica)

    def keep(self, replica, vector):
        """Keeps what is known of a synchronisation whose vector travelled.

        A best may stand for several synchronisations. Of a mean only the position that
        the rule agrees on is used again, and mostly that is in memory anyway.
        """
        if self._rule.exchange == "mean":
            vector = self._rule.agreed(self.state(replica), vector)
        self.vector[replica].assign(vector)

    def _note_agreed(self, replica):
        for flat, agreed in (
            (self._state, self._agreed_state),
            (self._averages, self._agreed_averages),
        ):
            if flat.size:
                agreed[replica].assign(flat.pack(replica))

    def heal(self, replica):
        """Gives a particle fresh slots."""
        for variables, fresh in self._slots:
            variable = variables[replica]
            variable.assign(_zeros.like(variable) + tf.cast(fresh, variable.dtype))

    def restart_averages(self, replica):
        """Begins a particle's moving averages anew, unless it got others'."""
        if not self._averages.size:
            weights = self._all_averaged_weights.pack(replica)
            self._all_averages.unpack(replica, weights)
        return True

    def rest(self):
        """Makes what the particles have now, all the same, what was agreed on.

        Not in a graph, which would keep constants as long as the rule's state.
        """
        self.each(self._rest)

    def _rest(self, replica):
        position = self.weights.pack(replica)
        self.remember(replica, self._rule.init(position))
        self.keep(replica, position)
        self._note_agreed(replica)

    def agreed_position(self, replica):
        """Returns the position, [P], that stands for the swarm."""
        vector = self.vector[replica].read_value()
        if self._rule.exchange == "mean":
            return vector
        return self._rule.agreed(self.state(replica), vector)

    def show_agreed(self, averages=False):
        """Shows what was agreed on, or was set since.

        Args:
            averages: Whether moving averages and weights have changed places.

        Returns:
            What `take_back` needs.
        """
        own = self._pack_own(), averages
        self._show_all()
        if averages:
            self._exchange()
        self._assign(self._set)
        self._set_while_shown = {}
        return *own, self._pack_state()

    def take_back(self, shown, averages=False):
        """Gives the particles what they had, but for what was set meanwhile.

        Args:
            shown: What `show_agreed` returned.
            averages: Whether moving averages and weights have changed places now.
        """
        own, averages_before, state = shown
        self._take_back(own, state)
        if averages != averages_before:
            self._exchange()
        self._assign(self._set_while_shown)
        self._set_while_shown = None

    @tf.function(autograph=False)
    def _pack_own(self):
        flats = self.weights, self._state, self._averages
        return self.each(lambda replica: [flat.pack(replica) for flat in flats])

    @tf.function(autograph=False)
    def _pack_state(self):
        return self.each(self._state.pack)

    @tf.function(autograph=False)
    def _show_all(self):
        self.each(lambda replica: self._show(replica, self.agreed_position(replica)))

    def _show(self, replica, position):
        self.weights.unpack(replica, position)
        self._state.unpack(replica, self._agreed_state[replica].read_value())
        self._averages.unpack(replica, self._agreed_averages[replica].read_value())

    @tf.function(autograph=False)
    def _exchange(self):
        """Lets weights and their moving averages change places, as Keras does."""

        def exchange(replica):
            weights = self._averaged_weights.pack(replica)
            averages = self._averages.pack(replica)
            with tf.control_dependencies([weights, averages]):
                self._averaged_weights.unpack(replica, averages)
                self._averages.unpack(replica, weights)

        self.each(exchange)

    @tf.function(autograph=False)
    def _take_back(self, own, shown):
        def take(replica):
            position, state, averages = own[replica]
            self.weights.unpack(replica, position)
            self._state.unpack_unless_set(replica, state, shown[replica])
            self._averages.unpack(replica, averages)

        self.each(take)


def _digest(variable):
    return zlib.crc32(variable.numpy().reshape(-1).view(np.uint8))
