"""Tells the launcher of a worker that the worker makes progress.

`python -m tf_psops.launch` names a file in the environment variable
`TF_PSOPS_HEARTBEAT`, and watches when it was last touched. This module does not import
TensorFlow.
"""

import contextlib
import os
import pathlib
import time

_SECONDS_BETWEEN = 0.5

_next_time = 0.0


def beat() -> None:
    """Tells the launcher, if there is one, that this worker has made progress.

    Call it where the work is done, not in a thread of its own, which would go on when
    the work hangs. It costs next to nothing: of all calls within half a second only the
    first touches the file. If the file cannot be touched, nothing happens.

    ```python
    for batch in batches:
        train_step(batch)
        heartbeat.beat()
    ```
    """
    global _next_time
    now = time.monotonic()
    if now < _next_time:
        return
    _next_time = now + _SECONDS_BETWEEN
    if path := os.environ.get("TF_PSOPS_HEARTBEAT"):
        with contextlib.suppress(OSError):
            pathlib.Path(path).touch()
