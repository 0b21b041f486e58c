"""Whether all workers were given the same."""

import hashlib

import numpy as np

from tf_psops import collectives


def check_same(strategy, settings):
    """Raises an error on every worker unless all have the same settings.

    All workers must call it with settings of the same names. It comes before any
    tensors travel whose shapes depend on them, because TensorFlow answers unequal
    shapes by ending all collectives of the process.

    Args:
        strategy: A `SwarmStrategy`.
        settings: A dict from names to what can be told apart by its `repr`.

    Raises:
        ValueError: If a setting is not the same on all workers.
    """
    if strategy.num_workers == 1:
        return
    table = collectives.tell(strategy, [_digest(v) for v in settings.values()])
    for (name, value), column in zip(settings.items(), table.T):
        if (column != column[0]).any():
            others = np.flatnonzero(column != column[0]).tolist()
            raise ValueError(
                f"The workers of a swarm must have the same settings, but {name} "
                f"differs: workers {others} have another one than worker 0. Received "
                f"on worker {strategy.worker_index}: {name}={repr(value)[:500]}. Run "
                "the same program with the same arguments on all workers."
            )


def _digest(value):
    """Returns a whole number below 2**52, which a float64 holds exactly."""
    digest = hashlib.sha256(repr(value).encode()).hexdigest()
    return int(digest[:13], 16)
