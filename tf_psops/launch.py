r"""Runs a command as several local workers, each with its own `TF_CONFIG`.

```bash
python -m tf_psops.launch --num_workers=4 -- \
    python -m trainers.train --dataset=digits
```

All workers run on this machine and find each other on free loopback ports. Their
output is shown line by line, with the worker's index in front. If one worker is lost,
the others are ended, because a swarm cannot synchronise without it.

A worker is lost if it fails, or is ended by a signal; with `--stall_timeout` also if it
makes no progress for so many seconds. Progress is output, or a call of
`tf_psops.heartbeat.beat`. A worker that waits for a lost one makes none either, so the
time has to be longer than any silence of a healthy run: its start, an evaluation.

With `--max_restarts`, all workers are then started again, on new ports, so that a
command that keeps backups goes on from the last one:

```bash
python -m tf_psops.launch --num_workers=4 --max_restarts=10 --min_workers=2 \
    --stall_timeout=600 -- python -m trainers.train --backup_dir=backups --elastic
```

`--min_workers` lets the run go on with fewer workers if one does not come back: if the
same worker is lost in two attempts in a row, in the second before its first beat. The
next attempt then has one worker less, all with new indices. Output is no sign of a
comeback, for a failing program prints why; so every loss of a command that never beats
counts as one before the first beat.

A command that cannot be started is not tried again, and a signal to the launcher ends
the run. At the end the launcher tells how often it restarted, why, and with how many
workers it ended.

Each worker leads a process group, which is ended as a whole: first with a signal,
then, after a grace, with SIGKILL. Should the launcher itself be killed, a small guard
process kills the groups. Only a process that moves to another process group escapes.
"""

import codecs
import contextlib
import io
import json
import math
import numbers
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from absl import app, flags

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
    "How many times to start all workers again after one was lost.",
    lower_bound=0,
)
_MIN_WORKERS = flags.DEFINE_integer(
    "min_workers",
    None,
    "Number of workers to go on with at least, if others do not come back after a "
    "restart. By default all have to.",
    lower_bound=1,
)
flags.register_multi_flags_validator(
    ["num_workers", "min_workers"],
    lambda values: (values["min_workers"] or 1) <= values["num_workers"],
    message="Expected --min_workers to be at most --num_workers. Lower it.",
)

_EXAMPLE = (
    "python -m tf_psops.launch --num_workers=4 -- python -m trainers.train "
    "--dataset=digits"
)
_HANDED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STALLED_EXIT_CODE = 124  # As of timeout(1).
# Before a restart; the others may hang in a collective with the lost worker.
_RESTART_GRACE_SECONDS = 2.0
_POLL_SECONDS = 0.01
# What a pass of the loop counts for at most. If the launcher itself is held up, as by a
# stopped terminal, so is the output of the workers.
_MAX_PASS_SECONDS = 0.5
# More than a pipe holds, so that one read empties it.
_CHUNK_BYTES = 1 << 20
# Each line of standard input lists the process groups that run; the end of the input
# means that the launcher is gone, for whatever reason. The argument is the folder with
# the heartbeats.
_GUARD = """
import os, shutil, signal, sys
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(signum, signal.SIG_IGN)
groups = ""
for groups in sys.stdin:
    pass
for group in groups.split():
    try:
        os.killpg(int(group), signal.SIGKILL)
    except OSError:
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


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
      max_restarts: How many times to start all workers again after one was lost, with
        new ports. Before a restart the grace is at most 2 seconds. Defaults to 0.
      min_workers: Number of workers to go on with at least, if others do not come
        back: after two attempts in a row that lost the same worker, the second before
        its first beat, the next has one worker less. Defaults to `num_workers`.

    Returns:
      0 if all workers exited with 0; else the exit code of the first that did not, 124
      if it made no progress; 127 if the command cannot be started. Where a signal ended
      that worker, or was handed on to all workers, 128 plus the signal's number. Of
      several attempts the last one counts.

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
    whole, real = numbers.Integral, numbers.Real
    _check(whole, 1, "at least 1", num_workers=num_workers)
    _check(real, 0, "at least 0", grace_seconds=grace_seconds)
    _check(real, 0, "at least 0 (no limit)", stall_timeout=stall_timeout)
    _check(whole, 0, "at least 0 (no restart)", max_restarts=max_restarts)
    _check(
        whole,
        1,
        f"from 1 to num_workers={num_workers}",
        num_workers,
        min_workers=min_workers,
    )
    output = sys.stdout if output is None else output
    if not hasattr(output, "write"):
        raise ValueError(
            f"`output` must be a text stream. Received: {output!r}. Pass an open file."
        )
    reasons: list[str] = []
    lost_index = None
    heartbeats = tempfile.mkdtemp(prefix="tf_psops-")
    with (
        _record_signals() as signums,
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, heartbeats],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        ) as guard,
        selectors.DefaultSelector() as selector,
    ):
        while True:
            group = _WorkerGroup(
                grace_seconds, stall_timeout or math.inf, output, guard, selector
            )
            group.start(command, num_workers, f"{heartbeats}/{len(reasons)}")
            exit_code = group.wait(signums, len(reasons) < max_restarts)
            if not group.lost:
                break
            reasons.append(group.reason)
            if group.lost.index == lost_index and not group.lost.has_beaten:
                num_workers = max(min_workers, num_workers - 1)
            lost_index = group.lost.index
            _log(
                output,
                f"restart {len(reasons)} of {max_restarts}, workers: {num_workers}",
            )
    if reasons:
        _log(output, f"restarts: {len(reasons)}, workers at the end: {num_workers}")
        for number, reason in enumerate(reasons, 1):
            _log(output, f"restart {number}: {reason}")
    return exit_code


class _Worker:
    """Runs one worker as the leader of a process group and prints its output."""

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        tf_config: str,
        heartbeat: str,
        grace_seconds: float,
        write: Callable[[str], None],
    ):
        self.index = index
        self.has_beaten = False
        self.process = subprocess.Popen(
            command,
            env={
                **os.environ,
                "TF_CONFIG": tf_config,
                "TF_PSOPS_HEARTBEAT": heartbeat,
                "PYTHONUNBUFFERED": "1",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
        )
        os.set_blocking(self.process.stdout.fileno(), False)
        self._heartbeat = heartbeat
        self._last_beat = 0
        self._silent_seconds = 0.0
        self._grace_seconds = grace_seconds
        self._kill_time = math.inf
        self._write = write
        # Makes "\r" and "\r\n" into "\n", so a progress bar becomes lines.
        self._decoder = io.IncrementalNewlineDecoder(
            codecs.getincrementaldecoder("utf-8")("replace"), translate=True
        )
        self._partial_line = ""

    def print_output(self, final: bool = False) -> bool:
        """Prints the full lines at hand, all of them if `final`; false at the end."""
        chunk = self.process.stdout.read(_CHUNK_BYTES)  # None if the pipe is empty.
        if chunk:
            self._silent_seconds = 0.0
        # Keras goes back over its progress bar with backspaces.
        text = self._decoder.decode(chunk or b"", final).replace("\b", "")
        text = self._partial_line + text + ("\n" if final else "")
        *lines, self._partial_line = text.split("\n")
        self._write(
            "".join(f"[worker {self.index}] {line}\n" for line in lines if line.strip())
        )
        return chunk != b""

    def find_loss(
        self, pass_seconds: float, stall_timeout: float
    ) -> tuple[int, str] | None:
        """Returns the launcher's exit code and the reason if the worker is lost."""
        code = self.process.poll()
        self._silent_seconds += pass_seconds
        with contextlib.suppress(FileNotFoundError):  # Before the first beat.
            beat = os.stat(self._heartbeat).st_mtime_ns
            if beat != self._last_beat:
                self._last_beat = beat
                self.has_beaten = True
                self._silent_seconds = 0.0
        if code:
            return _explain(self.index, code)
        if code is None and self._silent_seconds > stall_timeout:
            return _STALLED_EXIT_CODE, (
                f"worker {self.index} made no progress for "
                f"stall_timeout={stall_timeout:g} seconds"
            )
        return None

    def end(self, signum: int, grace_seconds: float = math.inf) -> None:
        """Sends a signal to the process group, to be killed after the grace."""
        self._signal(signum)
        self._signal(signal.SIGCONT)  # A stopped process would not see the signal.
        grace_seconds = min(grace_seconds, self._grace_seconds)
        self._kill_time = min(self._kill_time, time.monotonic() + grace_seconds)

    def is_running(self) -> bool:
        """Tells whether the process group runs, and ends what it should not leave."""
        overdue = time.monotonic() >= self._kill_time
        if overdue:
            self._signal(signal.SIGKILL)
        if self.process.poll() is None:
            return True
        if overdue or not self._signal(0):
            return False
        if self._kill_time == math.inf:
            self.end(signal.SIGTERM)
        return True

    def _signal(self, signum: int) -> bool:
        """Signals the process group; false if it has no process left."""
        try:
            os.killpg(self.process.pid, signum)
        except (ProcessLookupError, PermissionError):  # On macOS also for a zombie.
            return False
        return True


class _WorkerGroup:
    """Runs the workers of one cluster: all of them, or none."""

    def __init__(
        self,
        grace_seconds: float,
        stall_timeout: float,
        output: TextIO,
        guard: subprocess.Popen,
        selector: selectors.BaseSelector,
    ):
        self._grace_seconds = grace_seconds
        self._stall_timeout = stall_timeout
        self._output = output
        self._guard = guard
        self._selector = selector
        self._workers: list[_Worker] = []
        self._exit_code = 0
        self.reason = ""
        self.lost: _Worker | None = None
        self._write_error: OSError | None = None

    def start(self, command: Sequence[str], num_workers: int, heartbeat: str) -> None:
        """Starts the workers; if one cannot be started, ends them all."""
        for index, tf_config in enumerate(_tf_configs(num_workers)):
            try:
                worker = _Worker(
                    index,
                    command,
                    tf_config,
                    f"{heartbeat}-{index}",
                    self._grace_seconds,
                    self._write,
                )
            except OSError as error:
                self._end(
                    signal.SIGTERM,
                    127,
                    f"cannot start {command[0]!r}: {error.strerror}. "
                    "Check the command and its path.",
                )
                return
            self._workers.append(worker)
            self._tell_guard()
            self._selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def wait(self, signums: deque[int], may_restart: bool) -> int:
        """Waits until no worker runs, and returns the exit code of the launcher.

        Leaves the worker whose loss asks for a restart, if that may be, in `lost`.
        """
        pass_start = time.monotonic()
        while self._workers:
            for key, _ in self._selector.select(_POLL_SECONDS):
                if not key.data.print_output():
                    self._selector.unregister(key.fileobj)
            while signums:
                signum = signums.popleft()
                self._end(signum, 128 + signum, f"received {_describe(signum)}")
            now = time.monotonic()
            pass_seconds, pass_start = min(now - pass_start, _MAX_PASS_SECONDS), now
            for worker in list(self._workers):
                # In this order: else one that ends in between would count as well.
                is_running = worker.is_running()
                loss = worker.find_loss(pass_seconds, self._stall_timeout)
                if loss and not self._exit_code:
                    self._end(signal.SIGTERM, *loss, worker if may_restart else None)
                if not is_running:
                    self._remove(worker)
        if self.reason:
            self._write(f"[launch] {self.reason}\n")
        if self._write_error:
            raise self._write_error
        return self._exit_code

    def _write(self, text: str) -> None:
        """Writes to the output; if that fails (terminal gone), ends all workers."""
        if self._write_error:
            return
        try:
            self._output.write(text)
            self._output.flush()
        except OSError as error:
            self._write_error = error
            self._end(signal.SIGTERM, 1, "cannot write the output")

    def _end(
        self, signum: int, exit_code: int, reason: str, lost: _Worker | None = None
    ) -> None:
        """Ends all workers; the first reason counts, unless it asks for a restart."""
        if not self._exit_code or self.lost:
            self._exit_code, self.reason, self.lost = exit_code, reason, lost
        for worker in self._workers:
            worker.end(signum, _RESTART_GRACE_SECONDS if lost else math.inf)

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        self._tell_guard()
        worker.print_output(final=True)
        stdout = worker.process.stdout
        if stdout in self._selector.get_map():
            self._selector.unregister(stdout)
        stdout.close()

    def _tell_guard(self) -> None:
        groups = " ".join(str(worker.process.pid) for worker in self._workers)
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(f"{groups}\n".encode())


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


def _tf_configs(num_workers: int) -> list[str]:
    """Returns the `TF_CONFIG` of each worker of a cluster on free loopback ports."""
    with contextlib.ExitStack() as stack:
        # All sockets stay open until the last is bound, so that no port comes twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(num_workers)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{free.getsockname()[1]}" for free in sockets]
    return [
        json.dumps(
            {
                "cluster": {"worker": addresses},
                "task": {"type": "worker", "index": index},
            }
        )
        for index in range(num_workers)
    ]


def _explain(index: int, returncode: int) -> tuple[int, str]:
    """Returns the launcher's exit code for a failed worker, and what happened."""
    if returncode < 0:
        return 128 - returncode, f"worker {index} was ended by {_describe(-returncode)}"
    return returncode, f"worker {index} failed with exit code {returncode}"


def _check(
    kind: type, lowest: int, expected: str, highest: float = math.inf, **argument: float
) -> None:
    [(name, value)] = argument.items()
    if (
        not isinstance(value, kind)
        or isinstance(value, bool)
        or not lowest <= value <= highest
    ):
        number = "whole number" if kind is numbers.Integral else "number"
        raise ValueError(
            f"`{name}` must be {expected}. Received: {value!r}. Pass a {number} in "
            "this range."
        )


def _log(output: TextIO, text: str) -> None:
    print(f"[launch] {text}", file=output, flush=True)


def _describe(signum: int) -> str:
    return f"signal {signum} ({signal.strsignal(signum)})"


def main(argv: Sequence[str]) -> int:
    """Launches the command that follows `--` in `argv`."""
    command = argv[1:]
    if not command:
        raise app.UsageError(
            f"Expected a command after `--`, but there is none. Example:\n  {_EXAMPLE}"
        )
    # A worker may print what the terminal cannot show; that must not end the run.
    sys.stdout.reconfigure(errors="backslashreplace")
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
