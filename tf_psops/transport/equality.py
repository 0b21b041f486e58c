"""Whether all workers were given the same."""

import hashlib

import numpy as np


def check(strategy, occasion, settings):
    """Raises an error on every worker unless all have come to do the same.

    It comes before anything travels whose size depends on what is asked. Workers that
    ask different questions meet here, too, instead of waiting for each other.

    Args:
        strategy: A `SwarmStrategy`.
        occasion: What comes next, a string.
        settings: A dict from names to what can be told apart by its `repr`.

    Raises:
        ValueError: If the occasion or a setting is not the same on all workers.
    """
    if strategy.peers is None or not _others(strategy, [occasion, settings]):
        return
    for name, value in {"what comes next": occasion, **settings}.items():
        if others := _others(strategy, value):
            raise ValueError(
                f"The workers of a swarm must have the same settings, but {name} "
                f"differs: workers {others} have another one than the first. Received "
                f"on worker {strategy.worker_index}: "
                f"{name}={repr(value)[:500]}. Run the same program with the same "
                "arguments on all workers."
            )


def _others(strategy, value):
    """Returns the workers that have another value than the first one."""
    digest = hashlib.sha256(repr(value).encode()).digest()
    table = strategy.peers.gather(np.frombuffer(digest, np.uint8))
    told = {i: bytes(row) for i, row in enumerate(table) if row is not None}
    first = next(iter(told.values()))
    return [worker for worker, digest in told.items() if digest != first]
