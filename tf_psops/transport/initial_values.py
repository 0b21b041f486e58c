"""Gives all workers the chief's values of new variables, in one message."""

import hashlib

import numpy as np
import tensorflow as tf

from tf_psops import tensorflow_internals
from tf_psops.transport import equality


def share(strategy, variables):
    """Lets all replicas of the swarm begin with the first worker's values.

    All workers must call it with the variables that they have made since the last call.
    Values that are the same everywhere, as by the same seed, do not travel.

    Args:
        strategy: A `SwarmStrategy` over several workers.
        variables: Variables made in its scope.

    Raises:
        ValueError: If the workers have made different variables.
    """
    group, first = strategy.peers, strategy.peers.members[0]
    described = [(v.name, tuple(v.shape), v.dtype.name) for v in variables]
    count = {"number of new variables": len(described)}
    equality.check(strategy, "new variables", count)
    _check_descriptions(strategy, described)
    values = [_value(strategy, variable) for variable in variables]
    digests = [hashlib.sha256(value.tobytes()).digest()[:8] for value in values]
    told = group.gather(np.frombuffer(b"".join(digests), np.uint64))
    rows = [row for row in told if row is not None]
    others = np.flatnonzero(np.any([row != rows[0] for row in rows], axis=0))
    if not others.size:
        return
    mine = np.concatenate(
        [np.frombuffer(values[i].tobytes(), np.uint8) for i in others]
    )
    theirs = group.transaction(
        lambda: group.broadcast(mine, first, np.empty_like(mine))
    )
    for number in others:
        value = values[number]
        part, theirs = np.split(theirs, [value.nbytes])
        _assign(
            strategy, variables[number], part.view(value.dtype).reshape(value.shape)
        )


def _check_descriptions(strategy, described):
    """Raises an error that names the first variable that differs."""
    # Keras may number names differently.
    digests = [hashlib.sha256(repr(d[1:]).encode()).digest()[:8] for d in described]
    told = strategy.peers.gather(np.frombuffer(b"".join(digests), np.uint64))
    rows = [row for row in told if row is not None]
    for number in np.flatnonzero(np.any([row != rows[0] for row in rows], axis=0)):
        name, shape, dtype = described[number]
        equality.check(
            strategy,
            "new variables",
            {f"variable {number}": f"{name} of shape {shape} and type {dtype}"},
        )


def _first_place(strategy):
    return strategy.worker_index * len(strategy.extended.worker_devices)


def _value(strategy, variable):
    """Returns the value with which the swarm's first replica would begin."""
    value = strategy.experimental_local_results(variable)[0].read_value()
    if tensorflow_internals.is_seed(variable.name):
        value = tensorflow_internals.move_seed(value, -_first_place(strategy))
    return value.numpy()


def _assign(strategy, variable, value):
    for replica, copy in enumerate(strategy.experimental_local_results(variable)):
        own = tf.constant(value)
        if tensorflow_internals.is_seed(variable.name):
            places = _first_place(strategy) + replica
            own = tensorflow_internals.move_seed(own, places)
        copy.assign(own)
