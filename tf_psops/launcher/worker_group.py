"""The workers of one cluster that `tf_psops.launch` runs: all of them, or none."""

import contextlib
import json
import math
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import TextIO

from tf_psops.launcher import worker_process

# Before a restart; the others may hang in a collective with the lost worker.
_RESTART_GRACE_SECONDS = 2.0
_POLL_SECONDS = 0.01
# What a pass of the loop counts for at most. If the launcher itself is held up, as by a
# stopped terminal, so is the output of the workers.
_MAX_PASS_SECONDS = 0.5
# Each line of standard input lists the process groups that run; the end of the input
# means that the launcher is gone, for whatever reason.
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


def start_guard(heartbeats: str) -> subprocess.Popen:
    """Starts the process that, once the launcher is gone, kills what still runs.

    It also removes the folder with the heartbeats.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD, heartbeats],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,
    )


class WorkerGroup:
    """Runs the workers of one cluster: all of them, or none.

    Attributes:
      reason: Why all workers were ended, or "".
      lost: The worker whose loss asks for a restart, or `None`.
    """

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
        self._workers: list[worker_process.WorkerProcess] = []
        self._exit_code = 0
        self.reason = ""
        self.lost: worker_process.WorkerProcess | None = None
        self._write_error: OSError | None = None

    def start(self, command: Sequence[str], num_workers: int, heartbeat: str) -> None:
        """Starts the workers; if one cannot be started, ends them all."""
        for index, tf_config in enumerate(_tf_configs(num_workers)):
            try:
                worker = worker_process.WorkerProcess(
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
                self._end(
                    signum,
                    128 + signum,
                    f"received {worker_process.describe_signal(signum)}",
                )
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
        self,
        signum: int,
        exit_code: int,
        reason: str,
        lost: worker_process.WorkerProcess | None = None,
    ) -> None:
        """Ends all workers; the first reason counts, unless it asks for a restart."""
        if not self._exit_code or self.lost:
            self._exit_code, self.reason, self.lost = exit_code, reason, lost
        for worker in self._workers:
            worker.end(signum, _RESTART_GRACE_SECONDS if lost else math.inf)

    def _remove(self, worker: worker_process.WorkerProcess) -> None:
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
