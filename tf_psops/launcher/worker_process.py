"""One worker of `tf_psops.launch`: its process, its output, its loss, its end."""

import codecs
import contextlib
import io
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, cast

from tf_psops.launcher import startup_log

_STALLED_EXIT_CODE = 124  # As of timeout(1).
# More than a pipe holds, so that one read empties it.
_CHUNK_BYTES = 1 << 20


class WorkerProcess:
    """Runs one worker as the leader of a process group and prints its output.

    Attributes:
      index: The worker's task index.
      has_beaten: Whether `find_loss` has seen a heartbeat.
      is_lost: Whether the worker was given up; `find_loss` then finds nothing more.
      silent_seconds: Time since the last progress.
      process: The leader of the process group.
      output: The near end of the pipe that the worker writes to.
    """

    def __init__(
        self,
        index: int,
        command: Sequence[str],
        environ: Mapping[str, str],
        heartbeat: str,
        grace_seconds: float,
        write: Callable[[str], None],
    ):
        self.index = index
        self.has_beaten = False
        self.is_lost = False
        self.silent_seconds = 0.0
        self.process = subprocess.Popen(
            command,
            env={
                **environ,
                "TF_PSOPS_HEARTBEAT": heartbeat,
                "PYTHONUNBUFFERED": "1",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            start_new_session=True,
        )
        self.output = cast(IO[bytes], self.process.stdout)
        os.set_blocking(self.output.fileno(), False)
        self._heartbeat = heartbeat
        self._last_beat = 0
        self._grace_seconds = grace_seconds
        self._kill_time = math.inf
        self._write = write
        # Makes "\r" and "\r\n" into "\n", so a progress bar becomes lines.
        self._decoder = io.IncrementalNewlineDecoder(
            codecs.getincrementaldecoder("utf-8")("replace"), translate=True
        )
        self._partial_line = ""
        self._is_hidden = startup_log.hidden_by(environ)

    def print_output(self, final: bool = False) -> bool:
        """Prints the full lines at hand, all of them if `final`; false at the end."""
        chunk = self.output.read(_CHUNK_BYTES)  # None if the pipe is empty.
        if chunk:
            self.silent_seconds = 0.0
        # Keras goes back over its progress bar with backspaces.
        text = self._decoder.decode(chunk or b"", final).replace("\b", "")
        text = self._partial_line + text + ("\n" if final else "")
        *lines, self._partial_line = text.split("\n")
        self._write(
            "".join(
                f"[worker {self.index}] {line}\n"
                for line in lines
                if line.strip() and not self._is_hidden(line)
            )
        )
        return chunk != b""

    def find_loss(
        self, pass_seconds: float, stall_timeout: float
    ) -> tuple[int, str] | None:
        """Returns the launcher's exit code and the reason if the worker is lost."""
        if self.is_lost:
            return None
        code = self.process.poll()
        self.silent_seconds += pass_seconds
        with contextlib.suppress(FileNotFoundError):  # Before the first beat.
            beat = os.stat(self._heartbeat).st_mtime_ns
            if beat != self._last_beat:
                self._last_beat = beat
                self.has_beaten = True
                self.silent_seconds = 0.0
        if code:
            return _explain(self.index, code)
        if code is None and self.silent_seconds > stall_timeout:
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


def describe_signal(signum: int) -> str:
    """Returns the number and the name of a signal, for a message."""
    return f"signal {signum} ({signal.strsignal(signum)})"


def _explain(index: int, returncode: int) -> tuple[int, str]:
    """Returns the launcher's exit code for a failed worker, and what happened."""
    if returncode < 0:
        signum = -returncode
        return 128 + signum, f"worker {index} was ended by {describe_signal(signum)}"
    return returncode, f"worker {index} failed with exit code {returncode}"
