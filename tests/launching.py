"""What the tests of `tf_psops.launch` share: programs for workers, and a test case.

The processes are real, but small ones without TensorFlow.
"""

import errno
import io
import os
import pathlib
import signal
import sys
import tempfile
import time
from unittest import mock

from absl.testing import parameterized

from tf_psops import launch

TIMEOUT_SECONDS = 60
LAUNCHER = [sys.executable, "-m", "tf_psops.launch"]
# Starts a child in its own process group, and notes both process ids in $PIDS.
PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "100"])
open(f"{os.environ['PIDS']}/{os.getpid()}-{child.pid}", "w").close()
"""
# For one worker to say that it is ready, and for another to wait for that.
READY = "open(os.environ['PIDS'] + '/ready', 'w').close()\n"
AWAIT_READY = """
while not os.path.exists(os.environ["PIDS"] + "/ready"):
    time.sleep(0.01)
"""
IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def python(program):
    """Returns a command that runs a program in Python."""
    return [sys.executable, "-c", program]


def by_index(*programs):
    """Returns a command that runs `programs[i]` in worker `i`."""
    return python(
        "import json, os, signal, sys, time\n"
        "index = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
        f"exec({programs!r}[index])"
    )


def is_running(pid):
    """Returns whether there is such a process, and it is no zombie."""
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH):
            raise
        return False
    return state[0] != "Z"


def wait_until(condition):
    """Waits for a condition, for at most `TIMEOUT_SECONDS`."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


class LaunchTestCase(parameterized.TestCase):
    """Runs `launch`, and knows the processes that `PARENT` has noted."""

    def setUp(self):
        super().setUp()
        self.pids_dir = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.enter_context(mock.patch.dict(os.environ, {"PIDS": str(self.pids_dir)}))
        handler = signal.signal(signal.SIGALRM, self._time_out)
        self.addCleanup(signal.signal, signal.SIGALRM, handler)
        self.addCleanup(signal.alarm, 0)
        signal.alarm(TIMEOUT_SECONDS)

    def _time_out(self, signum, frame):
        raise TimeoutError(f"{self.id()} hangs")

    def launch(self, command, num_workers=2, grace_seconds=10.0, **options):
        output = io.StringIO()
        code = launch.launch(command, num_workers, grace_seconds, output, **options)
        return code, output.getvalue().splitlines()

    def pids(self):
        names = [path.name for path in self.pids_dir.glob("*-*")]
        return [int(pid) for name in names for pid in name.split("-")]

    def assert_no_orphan(self, num_workers=2):
        self.assertLen(self.pids(), 2 * num_workers)
        wait_until(lambda: not any(map(is_running, self.pids())))
