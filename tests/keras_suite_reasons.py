"""Why some of Keras' own tests cannot pass under a swarm, though nothing is wrong."""

import fnmatch

_REASONS = {}


def reason(name):
    """Returns why a test fails under a swarm by design, `None` if it must not."""
    for pattern, why in _REASONS.items():
        if fnmatch.fnmatchcase(name, pattern):
            return why
    return None
