"""Whether all workers were given the same."""

import functools
import hashlib

import numpy as np

from tf_psops.transport import collectives


class Equality:
    """Asks all workers of a swarm whether they have the same.

    It comes before any tensors travel whose shapes depend on what is asked, because
    TensorFlow answers unequal shapes by ending all collectives of the process. Workers
    that ask different questions meet here, too, instead of waiting for each other.

    Args:
        strategy: A `SwarmStrategy`.
    """

    def __init__(self, strategy):
        self._strategy = strategy

    @functools.cached_property
    def _collectives(self):
        strategy = self._strategy
        return collectives.Collectives(
            strategy.extended.worker_devices[:1],
            strategy.num_workers,
            strategy.worker_index,
            strategy.communication_options,
            strategy.wire,
        )

    def check(self, occasion, settings, name=""):
        """Raises an error on every worker unless all have come to do the same.

        Args:
            occasion: What comes next, a string.
            settings: A dict from names to what can be told apart by its `repr`.
            name: What may differ of the occasion, only to name it in errors.

        Raises:
            ValueError: If the occasion or a setting is not the same on all workers.
        """
        if self._strategy.num_workers == 1:
            return
        if not self._others([occasion, settings]):
            return
        self._compare("what comes next", occasion, f"{occasion} {name}".rstrip())
        for setting, value in settings.items():
            self._compare(setting, value, value)

    def _compare(self, name, value, shown):
        if others := self._others(value):
            raise ValueError(
                f"The workers of a swarm must have the same settings, but {name} "
                f"differs: workers {others} have another one than worker 0. Received "
                f"on worker {self._strategy.worker_index}: "
                f"{name}={repr(shown)[:500]}. Run the same program with the same "
                "arguments on all workers."
            )

    def _others(self, value):
        """Returns the workers that have another value than the first one."""
        row = np.array([_digest(value)], float)
        (column,) = self._collectives.tell([row], collectives.Call.TELL).T
        return np.flatnonzero(column != column[0]).tolist()


def _digest(value):
    """Returns a whole number below 2**52, which a float64 holds exactly."""
    digest = hashlib.sha256(repr(value).encode()).hexdigest()
    return int(digest[:13], 16)
