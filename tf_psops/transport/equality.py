"""Whether all workers were given the same."""

import hashlib

import numpy as np


class Equality:
    """Asks all workers of a swarm whether they have the same.

    It comes before anything travels whose size depends on what is asked. Workers that
    ask different questions meet here, too, instead of waiting for each other.

    Args:
        strategy: A `SwarmStrategy`.
    """

    def __init__(self, strategy):
        self._strategy = strategy

    def check(self, occasion, settings):
        """Raises an error on every worker unless all have come to do the same.

        Args:
            occasion: What comes next, a string.
            settings: A dict from names to what can be told apart by its `repr`.

        Raises:
            ValueError: If the occasion or a setting is not the same on all workers.
        """
        if self._strategy.peers is None or not self._others([occasion, settings]):
            return
        self._compare("what comes next", occasion)
        for setting, value in settings.items():
            self._compare(setting, value)

    def _compare(self, name, value):
        if others := self._others(value):
            raise ValueError(
                f"The workers of a swarm must have the same settings, but {name} "
                f"differs: workers {others} have another one than the first. Received "
                f"on worker {self._strategy.worker_index}: "
                f"{name}={repr(value)[:500]}. Run the same program with the same "
                "arguments on all workers."
            )

    def _others(self, value):
        """Returns the workers that have another value than the first one."""
        digest = hashlib.sha256(repr(value).encode()).digest()
        table = self._strategy.peers.gather(np.frombuffer(digest, np.uint8))
        told = {i: bytes(row) for i, row in enumerate(table) if row is not None}
        first = next(iter(told.values()))
        return [worker for worker, digest in told.items() if digest != first]
