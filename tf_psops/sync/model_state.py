"""What a model is made of: each of its variables, by what becomes of it in a swarm."""

from typing import NamedTuple

import keras
import tensorflow as tf

from tf_psops import tensorflow_internals


class ModelState(NamedTuple):
    """The variables of a model that were made in the scope of its strategy.

    They are its own: those that it, its layers, optimizers, metrics and other
    attributes hold, whatever else was made in the scope.

    Attributes:
        variables: All of them, in the order in which they were made.
        weights: What training moves by gradients, the position.
        state: Further float variables, but those of optimizers and metrics.
        moved: Those of `state` that the traced training step writes: moving statistics,
            teacher networks, weights that another optimizer trains.
        counts: Further variables that are not float, but seeds and those of optimizers
            and metrics.
        slots: The slots of all optimizers, but moving averages of weights.
        fresh: The number that each of the slots holds before training.
        averages: Moving averages of weights (`use_ema`), as pairs with the weight.
        seeds: The states of random layers.
        metrics: The sums of metrics.
        outside: What the model holds that was not made in the scope.
    """

    variables: list
    weights: list
    state: list
    moved: list
    counts: list
    slots: list
    fresh: list
    averages: list
    seeds: list
    metrics: list
    outside: list

    @property
    def identity(self):
        """Returns what is the same for two that need the same of a synchronisation."""
        sorts = self.weights, self.state, self.moved, self.counts, self.slots
        averages = [average for _, average in self.averages]
        return [[id(variable) for variable in sort] for sort in (*sorts, averages)]


def find(strategy, model, before=None):
    """Returns the `ModelState` of a `keras.Model` as training has shown it so far.

    Args:
        strategy: Its `SwarmStrategy`.
        model: The `keras.Model`.
        before: What was found when the training step was about to be traced. What is
            trainable, and what fresh slots hold, is as it was then.
    """
    objects = tensorflow_internals.reached(model)
    made = {id(variable) for variable in strategy.extended.variables()}
    held = {id(value): value for value in objects if isinstance(value, tf.Variable)}
    variables = [v for v in strategy.extended.variables() if id(v) in held]
    # Containers may have another order on another worker.
    place = {id(variable): number for number, variable in enumerate(variables)}
    optimizers = tensorflow_internals.optimizers_of(objects)
    weights = [variable.value for variable in model.trainable_variables]
    fresh = {}
    if before:
        weights = before.weights
        fresh = dict(zip(map(id, before.slots), before.fresh))
    averages = [
        (weight.value, average.value)
        for optimizer in optimizers
        for weight, average in tensorflow_internals.moving_averages(optimizer)
        if id(average.value) in place
    ]
    averages.sort(key=lambda pair: place[id(pair[1])])
    slots = {
        id(variable.value): (variable.value, _fresh(optimizer, variable))
        for optimizer in optimizers
        for variable in optimizer.variables
        if _is_slot(variable) and id(variable.value) in place
    }
    for _, average in averages:
        slots.pop(id(average), None)
    slots = [slots[key] for key in sorted(slots, key=place.get)]
    seeds = [
        value.state.value
        for value in objects
        if isinstance(value, keras.random.SeedGenerator)
    ]
    no_state = {
        *map(id, weights),
        *(
            id(variable.value)
            for value in objects
            if isinstance(value, keras.optimizers.Optimizer)
            for variable in value.variables
        ),
        *(
            # What a particle has read so far of its own sequence.
            id(variable.value)
            for value in objects
            if isinstance(value, keras.layers.RNN) and value.stateful
            for variable in tf.nest.flatten(value.states)
            if variable is not None
        ),
    }
    metrics = [v for v in variables if v.aggregation is tf.VariableAggregation.SUM]
    no_state.update(map(id, metrics))
    state = [v for v in variables if v.dtype.is_floating and id(v) not in no_state]
    return ModelState(
        variables=variables,
        weights=weights,
        state=state,
        # Where nobody knows, any of them.
        moved=[v for v in state if strategy.is_written(model, v) is not False],
        counts=[
            v
            for v in variables
            if not v.dtype.is_floating and id(v) not in no_state | set(map(id, seeds))
        ],
        slots=[slot for slot, _ in slots],
        fresh=[fresh.get(id(slot), value) for slot, value in slots],
        averages=averages,
        seeds=seeds,
        metrics=metrics,
        outside=[variable for key, variable in held.items() if key not in made],
    )


def check_outside(strategy, model, state):
    """Raises a `ValueError` if training changes what was not made in the scope.

    A swarm has one copy of it for each worker, and never averages it.
    """
    if strategy.num_replicas_in_sync == 1:
        return
    for variable in state.outside:
        if strategy.is_written(model, variable):
            raise ValueError(
                "Training changes a variable that was made outside of the scope of the "
                f"SwarmStrategy. Received: {variable.name!r}, of shape "
                f"{tuple(variable.shape)}, which the training step of "
                f"{type(model).__name__} {model.name!r} writes. Particles need a copy "
                "each: make the layer, metric or optimizer that holds it inside `with "
                "strategy.scope():`. Only what never changes may be made outside."
            )


def _is_slot(variable):
    is_float = tf.as_dtype(variable.dtype).is_floating
    return is_float and variable.name != "learning_rate"


def _fresh(optimizer, slot):
    """Returns the number that a slot holds before training."""
    iterations, *_ = optimizer.variables
    values = slot.numpy().ravel()
    if not iterations.numpy() and values.size and (values == values[0]).all():
        return float(values[0])
    of_squares = slot.name.endswith("accumulator") and "gradient" not in slot.name
    return getattr(optimizer, "initial_accumulator_value", 0.0) if of_squares else 0.0
