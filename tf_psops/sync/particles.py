"""The particles of one worker: what they are made of, and what they remember."""

import tensorflow as tf

from tf_psops import tensorflow_internals
from tf_psops.sync import flattening
from tf_psops.sync.second_moments import SecondMoments


class Particles:
    """Holds the variables of the local particles, one particle for each device.

    Args:
        strategy: A `SwarmStrategy`.
        model: The compiled and built `keras.Model` that was made in its scope.
        rule: A `CompiledRule`.
        first: The index of the first of them in the swarm.
        average_non_trainable: Whether non-trainable state is averaged.
        average_slots: Whether the optimizer's slots are averaged.
        rescale_moments: Whether the second moments among them are rescaled instead.

    Attributes:
        dtype: The `tf.DType` of all vectors.
        indices: The range of their indices in the swarm.
        weights: The `Flattening` of the positions, [P].
        averaged: The `Flattening` of what is averaged beside them.
        left_apart: The `Flattening` of state that is averaged only at the end.
        vector: For each of them the variable, [P], of the vector that travelled last.
        tensor_ids: For each of them the numbers, [P], of the tensors of the weights.
    """

    def __init__(
        self,
        strategy,
        model,
        rule,
        first,
        average_non_trainable,
        average_slots,
        rescale_moments,
    ):
        self._strategy = strategy
        self._model = model
        self._rule = rule
        self._devices = strategy.extended.worker_devices
        self.indices = range(first, first + len(self._devices))
        weights = model.trainable_variables
        state = tensorflow_internals.updated_state(model)
        slots = _slots(model.optimizer)
        doubles = any(v.dtype == "float64" for v in [*weights, *state, *slots])
        self.dtype = tf.float64 if doubles else tf.float32

        def pack(*variables):
            return flattening.Flattening(strategy, variables, self.dtype)

        averaged, left_apart = (state, []) if average_non_trainable else ([], state)
        self.weights = pack(*weights)
        self.averaged = pack(*averaged, *(slots if average_slots else []))
        if rescale_moments:
            # Keras has no other mark of them than this name.
            moments = [slot for slot in slots if slot.name.endswith("velocity")]
            self.averaged = flattening.Joined(
                self.averaged, SecondMoments(strategy, moments, self.dtype)
            )
        self.left_apart = pack(*left_apart)
        self._state = pack(*averaged)
        self._everything = pack(*weights, *state)
        self._slots = [(self._copies(slot), _fresh(slot)) for slot in slots]
        self.tensor_ids = self.each(lambda _: self.weights.tensor_ids())
        self._make_memory()

    def _make_memory(self):
        """Makes what particles remember: the rule's state, and what was agreed on."""
        position = tf.zeros([self.weights.size], self.dtype)
        memory = (
            self._rule.init(position),
            position,
            tf.zeros([self._state.size], self.dtype),
        )
        with self._strategy.scope():
            memory = tf.nest.map_structure(
                lambda value: tf.Variable(tf.zeros_like(value), trainable=False), memory
            )
        local = self._strategy.experimental_local_results

        def own(replica):
            return tf.nest.map_structure(lambda value: local(value)[replica], memory)

        self._memories = self.each(own)
        self._rule_state, self.vector, self._agreed_state = zip(*self._memories)

    def each(self, function):
        """Returns what a function of 0, 1, ... makes for each one, on its device."""
        results = []
        for replica, device in enumerate(self._devices):
            with tf.device(device):
                results.append(function(replica))
        return results

    def _copies(self, variable):
        return self._strategy.experimental_local_results(variable.value)

    def variables(self):
        """Returns the variables that each particle is made of, lists."""
        model = self._model
        of_keras = model.variables + model.optimizer.variables + model.metrics_variables
        copies = zip(*map(self._copies, of_keras), strict=True)
        return [
            [*own, *tf.nest.flatten(memory)]
            for own, memory in zip(copies, self._memories, strict=True)
        ]

    def moved(self):
        """Returns a nest of all variables that a synchronisation may change."""
        return self._memories, self._everything.variables, self.averaged.variables

    def restore(self, arrays, newcomers):
        """Gives the particles the values of others of the same model.

        Args:
            arrays: For each particle the values of its `variables`, in a newcomer's
                place those of another particle.
            newcomers: Indices of those that were not in the swarm. They start from the
                position that stands for it, with fresh slots.
        """
        for replica, (variables, values) in enumerate(zip(self.variables(), arrays)):
            own = set()
            if self.indices[replica] in newcomers:
                # Its random seeds, slots and metrics are its own, and fresh.
                self.heal(replica)
                own = {id(copies[replica]) for copies, _ in self._slots} | {
                    id(self._copies(variable)[replica])
                    for variable in self._model.non_trainable_variables
                    if not tf.as_dtype(variable.dtype).is_floating
                }
                own |= {
                    id(self._copies(variable)[replica])
                    for variable in self._model.metrics_variables
                }
            for variable, value in zip(variables, values):
                if id(variable) not in own:
                    variable.assign(value)
        for newcomer in newcomers:
            self._join(newcomer - self.indices[0])

    def _join(self, replica):
        with tf.device(self._devices[replica]):
            position = self.agreed_position(replica)
            self.remember(replica, self._rule.join(self.state(replica), position))
            self._show(replica, position)

    def state(self, replica):
        """Returns what a particle's rule remembers."""
        return tf.nest.map_structure(tf.identity, self._rule_state[replica])

    def remember(self, replica, state):
        """Replaces what a particle's rule remembers."""
        tf.nest.map_structure(
            lambda variable, value: variable.assign(value),
            self._rule_state[replica],
            state,
        )

    def agree(self, replica, vector, averaged):
        """Takes what travelled for a particle's own, but its position."""
        self.vector[replica].assign(vector)
        self.averaged.unpack(replica, averaged)
        self._agreed_state[replica].assign(self._state.pack(replica))

    def heal(self, replica):
        """Gives a particle fresh slots."""
        for variables, fresh in self._slots:
            variable = variables[replica]
            variable.assign(tf.cast(tf.fill(variable.shape, fresh), variable.dtype))

    def start(self, replica):
        """Returns the position and state to start from as one vector."""
        return self._everything.pack(replica)

    def begin(self, replica, start):
        """Puts a particle on another one's `start`, at rest."""
        self._everything.unpack(replica, start)
        self._rest(replica)

    @tf.function(autograph=False)
    def rest(self):
        """Makes what the particles have now, all the same, what was agreed on."""
        self.each(self._rest)

    def _rest(self, replica):
        position = self.weights.pack(replica)
        self.vector[replica].assign(position)
        self.remember(replica, self._rule.init(position))
        self._agreed_state[replica].assign(self._state.pack(replica))

    def agreed_position(self, replica):
        """Returns the position, [P], that stands for the swarm."""
        vector = self.vector[replica].read_value()
        return self._rule.agreed(self.state(replica), vector)

    @tf.function(autograph=False)
    def show_agreed(self):
        """Shows what was agreed on, and returns what the particles had."""

        def show(replica):
            own = self.weights.pack(replica), self._state.pack(replica)
            self._show(replica, self.agreed_position(replica))
            return own

        return self.each(show)

    def _show(self, replica, position):
        self.weights.unpack(replica, position)
        self._state.unpack(replica, self._agreed_state[replica])

    @tf.function(autograph=False)
    def take_back(self, own):
        """Gives the particles what they had, which `show_agreed` returned."""

        def take(replica):
            position, state = own[replica]
            self.weights.unpack(replica, position)
            self._state.unpack(replica, state)

        self.each(take)


def _fresh(slot):
    """Returns the number that a slot holds before training, 0 after it has begun."""
    values = slot.numpy().ravel()
    return float(values[0]) if values.size and (values == values[0]).all() else 0.0


def _slots(optimizer):
    """Returns the optimizer's slots: its float variables but the learning rate."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return [
        variable
        for variable in optimizer.variables
        if tf.as_dtype(variable.dtype).is_floating and variable.name != "learning_rate"
    ]
