"""The workers of one cluster that `tf_psops.launch` runs, and what a loss leads to."""

import contextlib
import math
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import IO, NamedTuple, TextIO, cast

from tf_psops.launcher import restarts, tf_configs, worker_process

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


def start_guard(folder: str) -> subprocess.Popen:
    """Starts the process that, once the launcher is gone, kills what still runs.

    It also removes the launcher's folder.
    """
    return subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,
    )


class Limits(NamedTuple):
    """When a worker, or the run, is given up.

    Attributes:
      grace_seconds: Time between asking a worker to end and killing it.
      stall_timeout: Time without progress after which a worker is lost.
      min_workers: How many workers the run goes on with at least when others are lost;
        `None` if all have to be there.
    """

    grace_seconds: float
    stall_timeout: float
    min_workers: int | None


class WorkerGroup:
    """Runs the workers of one cluster, all of them or, with `min_workers`, each alone.

    Attributes:
      reason: Why all workers were ended, or "".
      asks_for_restart: Whether they were ended for all of them to be started again.
      num_finished: How many workers have exited with 0.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        heartbeat: str,
        limits: Limits,
        run_restarts: restarts.Restarts,
        output: TextIO,
        guard: subprocess.Popen,
        selector: selectors.BaseSelector,
    ):
        self._command = command
        self._environ = environ
        self._heartbeat = heartbeat
        self._limits = limits
        self._restarts = run_restarts
        self._output = output
        self._guard = guard
        self._selector = selector
        self._workers: list[worker_process.WorkerProcess] = []
        self._tf_configs: list[str] = []
        self._num_starts = 0
        # When to start again which worker.
        self._start_times: dict[int, float] = {}
        self._has_beaten = False
        self._exit_code = 0
        self.reason = ""
        self.asks_for_restart = False
        self.num_finished = 0
        self._write_error: OSError | None = None

    def run(self, num_workers: int, signums: deque[int]) -> int:
        """Starts the workers, waits until none runs, and returns the exit code."""
        with tf_configs.reserve(num_workers) as self._tf_configs:
            for index in range(num_workers):
                failure = self._start(index)
                if failure:
                    self._end(signal.SIGTERM, *failure)
                    break
            self._wait(signums)
        if self.reason:
            self._log(self.reason)
        if self._write_error:
            raise self._write_error
        return self._exit_code

    def _start(self, index: int) -> tuple[int, str] | None:
        """Starts a worker; if it cannot be started, returns exit code and reason."""
        try:
            worker = worker_process.WorkerProcess(
                index,
                self._command,
                {**self._environ, "TF_CONFIG": self._tf_configs[index]},
                f"{self._heartbeat}-{self._num_starts}",
                self._limits.grace_seconds,
                self._write,
            )
        except OSError as error:
            return 127, (
                f"cannot start {self._command[0]!r}: {error.strerror}. "
                "Check the command and its path."
            )
        self._num_starts += 1
        self._workers.append(worker)
        self._tell_guard()
        self._selector.register(worker.output, selectors.EVENT_READ, worker)
        return None

    def _wait(self, signums: deque[int]) -> None:
        pass_start = time.monotonic()
        while self._workers or self._start_times:
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
                loss = worker.find_loss(pass_seconds, self._limits.stall_timeout)
                self._has_beaten |= worker.has_beaten
                if loss and not self._exit_code:
                    self._lose(worker, *loss)
                if not is_running:
                    self._remove(worker)
            self._start_those_due(now)
            self._end_latecomers()

    def _lose(
        self, worker: worker_process.WorkerProcess, exit_code: int, reason: str
    ) -> None:
        """Ends all workers, or with `min_workers` the lost one, to start it again."""
        if self._limits.min_workers is None:
            for_restart = self._restarts.are_left
            self._end(signal.SIGTERM, exit_code, reason, for_restart)
            return
        worker.is_lost = True
        worker.print_output()
        # It has nothing to save that the others would take, and what is left of its
        # process group may hold its port.
        worker.end(signal.SIGKILL)
        # They may have waited for it, and are not to be taken for stalled as well.
        for other in self._workers:
            other.silent_seconds = 0.0
        self._replace(worker.index, worker.has_beaten, exit_code, reason)

    def _replace(
        self, index: int, has_beaten: bool, exit_code: int, reason: str
    ) -> None:
        """Plans the restart of a lost worker, goes on without it, or ends the run."""
        self._log(reason)
        obstacle = self._restarts.find_obstacle(index, has_beaten)
        if 0 < self._count_there() == self.num_finished:
            obstacle = "the others have finished"
        if not obstacle:
            seconds = self._restarts.delay(index)
            self._start_times[index] = time.monotonic() + seconds
            self._log(
                f"{self._restarts.add(reason)}: worker {index}"
                + (f" in {seconds} s" if seconds else "")
            )
            return
        self._log(f"worker {index} stays away: {obstacle}")
        self._end_below_min_workers(exit_code)

    def _count_there(self) -> int:
        """Returns how many workers run, are about to start again or have finished."""
        running = sum(not worker.is_lost for worker in self._workers)
        return running + len(self._start_times) + self.num_finished

    def _end_below_min_workers(self, exit_code: int) -> None:
        there, needed = self._count_there(), self._limits.min_workers or 0
        if there < needed:
            self._end(
                signal.SIGTERM,
                exit_code,
                f"{there} of min_workers={needed} workers are left",
            )

    def _start_those_due(self, now: float) -> None:
        running = {worker.index for worker in self._workers}
        for index, start_time in list(self._start_times.items()):
            if now >= start_time and index not in running:
                del self._start_times[index]
                failure = self._start(index)
                if failure:
                    self._replace(index, False, *failure)

    def _end_latecomers(self) -> None:
        """Ends the workers that have started again when no swarm is left to join."""
        if (
            self._limits.min_workers is None
            or self._exit_code
            or not self.num_finished
            or not self._has_beaten
            or any(worker.has_beaten for worker in self._workers)
        ):
            return
        for worker in self._workers:
            is_silent = worker.silent_seconds > self._limits.grace_seconds
            if is_silent and not worker.is_lost:
                worker.is_lost = True
                worker.end(signal.SIGTERM)
                self._log(f"worker {worker.index} came after the others had finished")
                self._end_below_min_workers(exit_code=1)

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

    def _log(self, text: str) -> None:
        self._write(f"[launch] {text}\n")

    def _end(
        self,
        signum: int,
        exit_code: int,
        reason: str,
        for_restart: bool = False,
    ) -> None:
        """Ends all workers; the first reason counts, unless it asks for a restart."""
        if not self._exit_code or self.asks_for_restart:
            self._exit_code, self.reason = exit_code, reason
            self.asks_for_restart = for_restart
        self._start_times.clear()
        for worker in self._workers:
            worker.end(signum, _RESTART_GRACE_SECONDS if for_restart else math.inf)

    def _remove(self, worker: worker_process.WorkerProcess) -> None:
        self._workers.remove(worker)
        self._tell_guard()
        worker.print_output(final=True)
        if worker.output in self._selector.get_map():
            self._selector.unregister(worker.output)
        worker.output.close()
        self.num_finished += worker.process.returncode == 0 and not worker.is_lost

    def _tell_guard(self) -> None:
        groups = " ".join(str(worker.process.pid) for worker in self._workers)
        with contextlib.suppress(BrokenPipeError):
            cast(IO[bytes], self._guard.stdin).write(f"{groups}\n".encode())
