r"""Runs a command as several local workers, each with its own `TF_CONFIG`.

```bash
python -m tf_psops.launch --num_workers=4 -- \
    python -m trainers.train --dataset=digits
```

All workers run on this machine and find each other on free loopback ports. They share
a secret that the launcher makes, unless `TF_PSOPS_SECRET` or `TF_PSOPS_SECRET_FILE` is
set. Their output is shown line by line, with the worker's index in front, of
TensorFlow's own only the errors, unless `TF_CPP_MIN_LOG_LEVEL` is set. If one worker is
lost, the others are ended, because a swarm cannot synchronise without it.

A worker is lost if it fails, or is ended by a signal; with `--stall_timeout` also if it
makes no progress for so many seconds. Progress is output, or a call of
`tf_psops.heartbeat.beat`, which `PSOSync` calls, also while a worker waits for others:
that is bounded by `SwarmStrategy(timeout=...)`. The time has to be longer than any
silence of a healthy run, such as its start.

With `--max_restarts`, all workers are then started again, on new ports, so that a
command that keeps backups goes on from the last one:

```bash
python -m tf_psops.launch --num_workers=4 --max_restarts=10 --stall_timeout=600 -- \
    python -m trainers.train --backup_dir=backups
```

With `--min_workers` the others train on meanwhile, as many as that at least, and only
the lost worker is started again, at once and at the same address, to join them:

```bash
python -m tf_psops.launch --num_workers=4 --min_workers=3 --max_restarts=10 \
    --stall_timeout=600 -- python -m trainers.train
```

The workers find the number in `TF_PSOPS_MIN_WORKERS`, which `SwarmStrategy` takes for
its `min_workers`. A worker that is lost before its first beat waits longer from time to
time before it is started again, up to 4 seconds, and stays away after five such losses
in a row, as one does when no restart is left: the others go on without it. When fewer
are left than `--min_workers`, the run has failed. A worker that has exited with 0 has
finished. Of workers that make no progress, the one that stopped first is lost; the
others may have waited for it, and get the same time again. The time has to be longer
than a worker needs from its start to its first step, with a whole interval between two
synchronisations, for which it waits to join.

A command that cannot be started is not tried again, and a signal to the launcher ends
the run. At the end the launcher tells how often it restarted, and why.

Each worker leads a process group, which is ended as a whole: first with a signal,
then, after a grace, with SIGKILL. Should the launcher itself be killed, a small guard
process kills the groups. Only a process that moves to another process group escapes.
"""

import contextlib
import io
import math
import os
import selectors
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO, cast

from absl import app, flags

from tf_psops import _checks
from tf_psops.launcher import environment, restarts, worker_group

_NUM_WORKERS = flags.DEFINE_integer(
    "num_workers", 2, "Number of workers to run.", lower_bound=1
)
_GRACE_SECONDS = flags.DEFINE_float(
    "grace_seconds",
    10.0,
    "Time in seconds that a worker has to end by itself before it is killed.",
    lower_bound=0,
)
_STALL_TIMEOUT = flags.DEFINE_float(
    "stall_timeout",
    0.0,
    "Time in seconds without progress after which a worker is lost; 0 for no limit.",
    lower_bound=0,
)
_MAX_RESTARTS = flags.DEFINE_integer(
    "max_restarts",
    0,
    "How many times to start workers again after one was lost: all of them, or with "
    "--min_workers the lost one.",
    lower_bound=0,
)
_MIN_WORKERS = flags.DEFINE_integer(
    "min_workers",
    None,
    "Number of workers to go on with at least when others are lost. By default all "
    "have to be there.",
    lower_bound=1,
)
flags.register_multi_flags_validator(
    ["num_workers", "min_workers"],
    lambda values: (
        values["min_workers"] is None
        or values["num_workers"]
        <= 2 * values["min_workers"]
        <= 2 * values["num_workers"]
    ),
    message="Expected --min_workers to be at least half of --num_workers, so that a "
    "split never leaves two swarms, and at most all of them.",
)

_EXAMPLE = (
    "python -m tf_psops.launch --num_workers=4 -- python -m trainers.train "
    "--dataset=digits"
)
_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def launch(
    command: Sequence[str],
    num_workers: int,
    grace_seconds: float = 10.0,
    output: TextIO | None = None,
    *,
    stall_timeout: float = 0.0,
    max_restarts: int = 0,
    min_workers: int | None = None,
) -> int:
    """Runs `command` as local workers and waits until all have ended.

    Worker `i` gets task index `i` in `TF_CONFIG`, and unbuffered Python output. SIGINT,
    SIGTERM and SIGHUP are handed on to the workers, unless this process ignores them,
    so call this function from the main thread.

    ```python
    exit_code = launch([sys.executable, "train.py", "--epochs=3"], num_workers=4)
    ```

    Args:
      command: Program and arguments.
      num_workers: Number of workers, at least 1.
      grace_seconds: Time in seconds between asking a worker to end and killing it.
        Defaults to 10.
      output: Text stream for the workers' output. Defaults to `sys.stdout`.
      stall_timeout: Time in seconds without progress (output, or a
        `tf_psops.heartbeat.beat`) after which a worker is lost. Defaults to 0: no
        limit.
      max_restarts: How many times to start workers again after one was lost: with
        `min_workers` that one, else all of them, with new ports, after a grace of at
        most 2 seconds. Defaults to 0.
      min_workers: Number of workers to go on with at least when others are lost, at
        least half of them. Defaults to `num_workers`: all have to be there.

    Returns:
      0 if all workers exited with 0, or with `min_workers` so many of them; else the
      exit code of the worker whose loss ended the run, 124 if it made no progress; 127
      if the command cannot be started. Where a signal ended that worker, or was handed
      on to all workers, 128 plus the signal's number.

    Raises:
      ValueError: If `command` is empty or one string, or a number is out of its range.
      OSError: If `output` cannot be written to. The workers have been ended.
    """
    if (
        not isinstance(command, (list, tuple))
        or not command
        or not all(isinstance(part, (str, os.PathLike)) for part in command)
    ):
        raise ValueError(
            f"`command` must be a non-empty list of strings. Received: {command!r}. "
            'Pass the program and each argument apart, such as ["python", "train.py"].'
        )
    if min_workers is None:
        min_workers = num_workers
    whole, real = _checks.is_whole, _checks.is_real
    _check(whole, 1, "at least 1", num_workers=num_workers)
    _check(real, 0, "at least 0", grace_seconds=grace_seconds)
    _check(real, 0, "at least 0 (no limit)", stall_timeout=stall_timeout)
    _check(whole, 0, "at least 0 (no restart)", max_restarts=max_restarts)
    half = (num_workers + 1) // 2
    _check(
        whole,
        half,
        f"from {half} to num_workers={num_workers}: at least half of the workers, so "
        "that a split network never leaves two swarms",
        num_workers,
        min_workers=min_workers,
    )
    output = sys.stdout if output is None else output
    if not hasattr(output, "write"):
        raise ValueError(
            f"`output` must be a text stream. Received: {output!r}. Pass an open file."
        )
    if min_workers == num_workers:
        min_workers = None
    limits = worker_group.Limits(grace_seconds, stall_timeout or math.inf, min_workers)
    run_restarts = restarts.Restarts(max_restarts)
    folder = tempfile.mkdtemp(prefix="tf_psops-")
    with (
        _record_signals() as signums,
        worker_group.start_guard(folder) as guard,
        selectors.DefaultSelector() as selector,
    ):
        environ = environment.for_workers(os.environ, folder, min_workers)
        while True:
            group = worker_group.WorkerGroup(
                command,
                environ,
                f"{folder}/beat-{len(run_restarts.reasons)}",
                limits,
                run_restarts,
                output,
                guard,
                selector,
            )
            exit_code = group.run(num_workers, signums)
            if not group.asks_for_restart:
                break
            _log(output, f"{run_restarts.add(group.reason)}: all workers")
    reasons = run_restarts.reasons
    if reasons:
        ending = f", workers at the end: {group.num_finished}" if min_workers else ""
        _log(output, f"restarts: {len(reasons)}{ending}")
        for number, reason in enumerate(reasons, 1):
            _log(output, f"restart {number}: {reason}")
    return exit_code


@contextlib.contextmanager
def _record_signals() -> Iterator[deque[int]]:
    """Collects the signals to hand on, except those that are ignored (`nohup`)."""
    signums: deque[int] = deque()
    handlers = {
        signum: signal.signal(signum, lambda signum, _: signums.append(signum))
        for signum in _HANDED_ON
        if signal.getsignal(signum) is not signal.SIG_IGN
    }
    try:
        yield signums
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _check(
    is_kind: Callable[[object], bool],
    lowest: int,
    expected: str,
    highest: float = math.inf,
    **argument: float,
) -> None:
    [(name, value)] = argument.items()
    if not is_kind(value) or not lowest <= value <= highest:
        number = "whole number" if is_kind is _checks.is_whole else "number"
        raise ValueError(
            f"`{name}` must be {expected}. Received: {value!r}. Pass a {number} in "
            "this range."
        )


def _log(output: TextIO, text: str) -> None:
    print(f"[launch] {text}", file=output, flush=True)


def main(argv: Sequence[str]) -> int:
    """Launches the command that follows `--` in `argv`."""
    command = argv[1:]
    if not command:
        raise app.UsageError(
            f"Expected a command after `--`, but there is none. Example:\n  {_EXAMPLE}"
        )
    # A worker may print what the terminal cannot show; that must not end the run.
    cast(io.TextIOWrapper, sys.stdout).reconfigure(errors="backslashreplace")
    return launch(
        command,
        _NUM_WORKERS.value,
        _GRACE_SECONDS.value,
        stall_timeout=_STALL_TIMEOUT.value,
        max_restarts=_MAX_RESTARTS.value,
        min_workers=_MIN_WORKERS.value,
    )


if __name__ == "__main__":
    app.run(main)
