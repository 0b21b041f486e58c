"""A rule as a synchronisation calls it: compiled by XLA, and checked."""

import tensorflow as tf

from tf_psops import _xla
from tf_psops.rules import rule as rule_lib
from tf_psops.rules import shared_rule


class CompiledRule:
    """Calls the functions of a rule, and checks what they return while they are traced.

    `move` and `agreed` are compiled.

    Args:
        rule: A `Rule`.
    """

    def __init__(self, rule):
        self._rule = rule
        self.exchange = rule.exchange
        self.needs_fitness = rule.needs_fitness
        self.join = rule.join
        self.is_shared = isinstance(rule, shared_rule.SharedRule)
        self._move_in_place = _xla.compiled_in_place(self._move)
        self.agreed = _xla.compiled(self._agreed)

    @property
    def name(self):
        """Returns the name of the rule's class."""
        return type(self._rule).__name__

    def init(self, position):
        """Returns a particle's state before the first synchronisation."""
        state = self._rule.init(position)
        rule_lib.check_state(self._rule, state)
        return state

    def offer(self, state, position, fitness):
        """Returns a particle's new state and its offer, with no NaN for a score."""
        returned = self._rule.offer(state, position, fitness)
        expected = state, rule_lib.Offer(position, fitness)
        rule_lib.check_returned(self._rule, "offer", returned, expected)
        state, offer = returned
        score = tf.where(tf.math.is_finite(offer.score), offer.score, float("inf"))
        return state, offer._replace(score=score)

    def measures(self, state, news):
        """Returns what the rule has to log, a dict from names to float64 scalars."""
        measures = self._rule.measures(state, news)
        rule_lib.check_measures(self._rule, measures)
        return {name: tf.cast(value, tf.float64) for name, value in measures.items()}

    def factors(self, state, news, num_tensors, add_up=list):
        """Returns numbers for the particle's move.

        Args:
            state: See `Rule.factors`.
            news: See `Rule.factors`.
            num_tensors: See `Rule.factors`.
            add_up: A function of the `sums` of a share that returns those of all.
        """
        if self.is_shared:
            sums = self._rule.sums(state, news.vector)
            news = news._replace(sums=add_up(sums))
        return self._rule.factors(state, news, num_tensors)

    def lead(self, state, mean, factors):
        """Changes a NumPy array, the mean, to where a `SharedRule` leads from there."""
        self._rule.lead(state, mean, factors)

    def follow(self, state, position):
        """Moves a particle to where a `SharedRule` has led the mean, and returns it.

        Args:
            state: The variables that hold its state, which change.
            position: [P].
        """
        values = tf.nest.map_structure(lambda variable: variable.read_value(), state)
        followed = self._rule.follow(values, position)
        tf.nest.map_structure(lambda old, new: old.assign(new), state, followed)
        return position

    def move(self, state, position, news, make_tensor_ids):
        """Moves a particle, and returns its new position.

        Args:
            state: The variables that hold its state, which change.
            position: See `Rule.move`.
            news: See `Rule.move`.
            make_tensor_ids: A function that returns `tensor_ids` of any integer type,
                called only if the rule uses them.
        """

        def trace(tensor_ids):
            values = tf.nest.map_structure(tf.convert_to_tensor, state)
            self._move(values, position, news, tensor_ids)

        spec = tf.TensorSpec(position.shape, tf.int32)
        traced = tf.function(trace, autograph=False).get_concrete_function(spec)
        is_used = bool(traced.inputs[0].consumers())
        ids = make_tensor_ids() if is_used else None
        return self._move_in_place(state, position, news, ids)

    def _move(self, state, position, news, tensor_ids):
        # Any others, where nobody uses them: their like is not in memory.
        tensor_ids = tf.cast(position if tensor_ids is None else tensor_ids, tf.int32)
        returned = self._rule.move(state, position, news, tensor_ids)
        rule_lib.check_returned(self._rule, "move", returned, (state, position))
        return returned

    def _agreed(self, state, vector):
        position = self._rule.agreed(state, vector)
        rule_lib.check_returned(self._rule, "agreed", position, vector)
        return position
