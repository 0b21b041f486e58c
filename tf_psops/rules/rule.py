"""The protocol between a synchronisation rule and the swarm that it moves.

A rule is pure: functions of tensors, the same on every particle, with no word of
devices, workers or Keras. A position is the model's trainable weights as one flat
float vector of P elements. At a synchronisation

  1. every particle makes an `Offer` from its own position and fitness;
  2. one vector travels: the offer with the lowest score (`exchange = "best"`), or
     the mean of the offers of all particles in good health (`exchange = "mean"`);
  3. every particle moves by what it learnt, which it gets as `News`.
"""

from typing import Any, Literal, NamedTuple

import tensorflow as tf

from tf_psops import _checks


class Offer(NamedTuple):
    """What one particle brings to a synchronisation.

    Attributes:
        vector: [P], what may travel to all particles.
        score: Scalar. With `exchange = "best"` the lowest finite score of the swarm
            travels, ties going to the particle of the lowest index. A particle that
            offers the same score twice running must offer the same vector: it is
            then not sent again.
    """

    vector: tf.Tensor
    score: tf.Tensor


class News(NamedTuple):
    """What one particle learns at a synchronisation.

    Attributes:
        vector: [P], the best offer of the swarm, or the mean of all offers.
        fitness: [W], the training loss of every particle since the last
            synchronisation, infinite for a particle that is out of order.
        particle: Scalar int32, the index of this particle, 0 to W - 1.
        sync: Scalar int32, the number of this synchronisation, from 0.
        learning_rate: Scalar, the mean learning rate of the swarm's local steps since
            the last synchronisation.
        distances: [W], how far every particle is from the position that stood for the
            swarm since the last synchronisation, which `Rule.agreed` gives; infinite
            for a particle that is out of order. Of more than half a million elements
            a sample stands for all of them.
        sums: What the `sums` of a `SharedRule` gave.
        factors: What the rule's `factors` gave.
    """

    vector: tf.Tensor
    fitness: tf.Tensor
    particle: tf.Tensor
    sync: tf.Tensor
    learning_rate: tf.Tensor
    distances: tf.Tensor
    sums: Any = None
    factors: Any = None


class Rule:
    """How the particles of a swarm move at a synchronisation.

    A rule of one's own is a subclass with `exchange` and `move`, and what else it
    needs of the other functions. `move` and `agreed` are compiled by XLA, as all that
    is arithmetic on whole vectors should be: they take and return tensors of fixed
    shapes. A state is a `NamedTuple` of tensors.

    Example:

    ```python
    class HalfWay(tf_psops.Rule):
        \"\"\"Moves every particle half-way to the mean.\"\"\"

        exchange = "mean"

        def move(self, state, position, news, tensor_ids):
            return state, 0.5 * (position + news.vector)

    model.fit(dataset, callbacks=[tf_psops.PSOSync(10, HalfWay())])
    ```
    """

    exchange: Literal["best", "mean"] = "mean"
    """Which vector travels: "best" or "mean"."""

    needs_fitness: bool = True
    """Whether it uses the fitness: if not, training may have a loss that is unknown."""

    def init(self, position: tf.Tensor) -> Any:
        """Returns a particle's state before the first synchronisation.

        Args:
            position: [P], the weights that all particles start from.
        """
        del position
        return ()

    def offer(
        self, state: Any, position: tf.Tensor, fitness: tf.Tensor
    ) -> tuple[Any, Offer]:
        """Returns a particle's new state and what it brings to a synchronisation.

        Args:
            state: The particle's state.
            position: [P], where local training has led the particle.
            fitness: Scalar, the particle's mean training loss since the last
                synchronisation; infinite where the loss or a weight was not finite.
        """
        return state, Offer(position, fitness)

    def factors(self, state: Any, news: News, num_tensors: int) -> Any:
        """Returns numbers for the particle's move, which gets them as `News.factors`.

        Apart from `move`, because XLA takes long to compile random numbers, makes
        other ones of the same seed, and is slow at sums over a long vector.

        Args:
            state: The particle's state, as `offer` left it.
            news: What the particle learns, but `factors`.
            num_tensors: The number of weight tensors in the position.
        """
        del state, news, num_tensors
        return None

    def move(
        self, state: Any, position: tf.Tensor, news: News, tensor_ids: tf.Tensor
    ) -> tuple[Any, tf.Tensor]:
        """Returns a particle's new state and its new position, [P].

        Args:
            state: The particle's state, as `offer` left it.
            position: [P], where local training has led the particle.
            news: What the particle learns.
            tensor_ids: [P], int32, the number of the weight tensor that each element
                of the position belongs to, from 0, for `tf.gather` to give a number
                of each tensor to all of its elements.
        """
        raise NotImplementedError

    def measures(self, state: Any, news: News) -> dict[str, tf.Tensor]:
        """Returns numbers for `PSOSync.log`, a dict from names to scalars.

        By default none. Those of the first particle of each worker are logged there.
        They should cost nothing: what `move` or `factors` need anyway.

        Args:
            state: The particle's state, as `move` left it.
            news: What the particle has learnt.
        """
        del state, news
        return {}

    def agreed(self, state: Any, vector: tf.Tensor) -> tf.Tensor:
        """Returns the position, [P], that stands for the whole swarm.

        It must be the same on every particle: training ends with it.

        Args:
            state: The particle's state, as `move` left it.
            vector: [P], the vector that travelled last.
        """
        del state
        return vector

    def join(self, state: Any, position: tf.Tensor) -> Any:
        """Returns the state of a particle that joins a swarm which is under way.

        By default that of another particle, for states that all particles share.

        Args:
            state: Another particle's state.
            position: [P], the position that stands for the swarm, where it starts.
        """
        del position
        return state


def check_rule(rule):
    """Raises a `ValueError` unless a swarm can be moved by a rule.

    Args:
        rule: What the user gave.
    """
    _checks.check(
        isinstance(rule, Rule),
        "a `tf_psops.Rule`, such as tf_psops.CentroidSwarm()",
        rule=rule,
    )
    good = isinstance(rule.needs_fitness, bool)
    _checks.check(good, "True or False", **{"rule.needs_fitness": rule.needs_fitness})
    good = isinstance(rule.exchange, str) and rule.exchange in ("best", "mean")
    _checks.check(good, "'best' or 'mean'", **{"rule.exchange": rule.exchange})
    if type(rule).move is Rule.move:
        raise ValueError(
            "Invalid value for argument `rule`. Expected a rule with the function "
            f"`move`. Received: {rule!r}, which has none. Define "
            f"{type(rule).__name__}.move; see `tf_psops.Rule.move`."
        )


def describe(rule):
    """Returns the name of a rule's class and its constants, as text."""
    constants = {
        name: value
        for name, value in sorted(vars(rule).items())
        # Others may show where they are in memory, which differs between workers.
        if isinstance(value, (bool, int, float, str, tuple))
    }
    return f"{type(rule).__name__}({constants})"


def check_state(rule, state):
    """Raises a `ValueError` unless what a rule's `init` returned is a state."""
    if not all(map(tf.is_tensor, tf.nest.flatten(state))):
        raise ValueError(
            f"The rule {type(rule).__name__} cannot move the swarm by what its `init` "
            f"returned. Expected: a `NamedTuple` of tensors. Received: "
            f"{_describe(state)}. See `tf_psops.Rule.init`."
        )


def check_returned(rule, function, returned, expected):
    """Raises a `ValueError` unless a function of a rule returned what it has to.

    Args:
        rule: A `Rule`.
        function: The name of its function.
        returned: What that returned.
        expected: Tensors of the same nesting, shapes and types.
    """
    try:
        tf.nest.assert_same_structure(returned, expected)
        good = all(
            one.shape == other.shape and one.dtype == other.dtype
            for one, other in zip(tf.nest.flatten(returned), tf.nest.flatten(expected))
        )
    except (TypeError, ValueError, AttributeError):
        good = False
    if not good:
        raise ValueError(
            f"The rule {type(rule).__name__} cannot move the swarm by what its "
            f"`{function}` returned. Expected: {_describe(expected)}. Received: "
            f"{_describe(returned)}. See `tf_psops.Rule.{function}`."
        )


def check_measures(rule, measures):
    """Raises a `ValueError` unless a rule's `measures` returned scalars by their names.

    Args:
        rule: A `Rule`.
        measures: What its `measures` returned.
    """
    good = isinstance(measures, dict) and all(
        isinstance(name, str)
        and tf.is_tensor(value)
        and value.shape.rank == 0
        and (value.dtype.is_floating or value.dtype.is_integer)
        for name, value in measures.items()
    )
    if not good:
        raise ValueError(
            f"The rule {type(rule).__name__} has `measures` that cannot be logged. "
            "Expected: a dict from names to scalar tensors of a real type. Received: "
            f"{_describe(measures)}. See `tf_psops.Rule.measures`."
        )


def _describe(value):
    """Returns a nest with the type and shape of each tensor in its place."""

    def describe(part):
        if not tf.is_tensor(part):
            return part
        return f"{part.dtype.name} {part.shape}"

    return tf.nest.map_structure(describe, value)
