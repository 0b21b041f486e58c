"""Tests of how `tf_psops.launch` ends: exit codes, signals, and nothing left."""

import contextlib
import errno
import os
import signal
import subprocess
import tempfile
import time
from unittest import mock

import launching
from absl.testing import absltest, parameterized

from tf_psops import launch
from tf_psops.launcher import worker_process


def setUpModule():
    # A test run in the background may ignore SIGINT, and its children with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class ExitCodeTest(launching.LaunchTestCase):
    def test_first_failure_ends_others(self):
        code, lines = self.launch(
            launching.by_index(
                "time.sleep(100)", "print('bye'); sys.exit(7)", "time.sleep(100)"
            ),
            num_workers=3,
        )
        self.assertEqual(code, 7)
        self.assertEqual(
            lines, ["[worker 1] bye", "[launch] worker 1 failed with exit code 7"]
        )

    def test_killed_by_signal(self):
        code, lines = self.launch(
            launching.by_index(
                "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(100)"
            )
        )
        self.assertEqual(code, 128 + signal.SIGKILL)
        self.assertEqual(lines, ["[launch] worker 0 was ended by signal 9 (Killed)"])

    def test_kills_after_grace(self):
        stubborn = launching.IGNORE_SIGTERM + launching.READY + "time.sleep(100)"
        fails = launching.AWAIT_READY + "sys.exit(3)"
        start = time.monotonic()
        code, lines = self.launch(
            launching.by_index(stubborn, fails), grace_seconds=0.5
        )
        self.assertEqual(code, 3)
        self.assertBetween(time.monotonic() - start, 0.5, 9)
        self.assertEqual(lines[-1], "[launch] worker 1 failed with exit code 3")

    def test_graceful_end_does_not_hide_failure(self):
        graceful = f"""
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(5)))
{launching.READY}
time.sleep(100)
"""
        code, lines = self.launch(
            launching.by_index(graceful, launching.AWAIT_READY + "sys.exit(3)")
        )
        self.assertEqual(code, 3)
        self.assertIn("[worker 0] saved", lines)

    def test_left_behind_is_ended(self):
        code, lines = self.launch(launching.python(launching.PARENT), grace_seconds=2)
        self.assertEqual(code, 0)
        self.assertEmpty(lines)
        self.assert_no_orphan()

    def test_left_behind_has_grace(self):
        child = """
import os, pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    pathlib.Path(os.environ["PIDS"], "saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
os.write(1, b"ready")
time.sleep(100)
"""
        wrapper = f"""
import subprocess
child = subprocess.Popen({launching.python(child)!r}, stdout=subprocess.PIPE)
child.stdout.read(5)
"""
        code, _ = self.launch(launching.python(wrapper), num_workers=1, grace_seconds=2)
        self.assertEqual(code, 0)
        self.assertTrue((self.pids_dir / "saved").exists())

    def test_cannot_start(self):
        code, lines = self.launch(["/no/such/program"])
        self.assertEqual(code, 127)
        self.assertLen(lines, 1)
        self.assertRegex(lines[0], "cannot start '/no/such/program': .* Check the")

    def test_cannot_start_second_worker(self):
        real, calls = worker_process.WorkerProcess, []

        def worker(index, *args):
            calls.append(index)
            if index == 1:
                raise FileNotFoundError(errno.ENOENT, "gone")
            return real(index, *args)

        with mock.patch.object(worker_process, "WorkerProcess", worker):
            code, _ = self.launch(["sleep", "100"], num_workers=3)
        self.assertEqual(code, 127)
        self.assertEqual(calls, [0, 1])

    def test_a_worker_that_fails_while_it_is_looked_at(self):
        def slow(method):
            def look(*args):
                result = method(*args)
                time.sleep(0.3)
                return result

            return look

        worker = worker_process.WorkerProcess
        with (
            mock.patch.object(worker, "find_loss", slow(worker.find_loss)),
            mock.patch.object(worker, "is_running", slow(worker.is_running)),
        ):
            for delay in (0.2, 0.35, 0.5, 0.65):
                program = f"time.sleep({delay}); sys.exit(3)"
                code, _ = self.launch(launching.by_index(program), num_workers=1)
                self.assertEqual(code, 3, delay)


class SignalTest(launching.LaunchTestCase):
    @contextlib.contextmanager
    def launcher(self, program, *arguments):
        """Yields a launcher of two workers once both run and have a child."""
        with subprocess.Popen(
            [*launching.LAUNCHER, *arguments, "--", *launching.python(program)],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                launching.wait_until(lambda: len(self.pids()) == 4)
                yield process
            finally:
                process.kill()

    @parameterized.parameters(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    def test_handed_on(self, signum):
        # Under `nohup` the launcher would go on, as it should.
        self.addCleanup(signal.signal, signum, signal.signal(signum, signal.SIG_DFL))
        program = f"""
import signal, sys
signal.signal({int(signum)}, lambda *_: (print("saved"), sys.exit(0)))
{launching.PARENT}
time.sleep(100)
"""
        with self.launcher(program) as process:
            process.send_signal(signum)
            output, _ = process.communicate(timeout=launching.TIMEOUT_SECONDS)
        self.assertEqual(process.returncode, 128 + signum)
        *lines, last = output.splitlines()
        self.assertCountEqual(lines, ["[worker 0] saved", "[worker 1] saved"])
        self.assertStartsWith(last, f"[launch] received signal {int(signum)} (")
        self.assert_no_orphan()

    def test_kills_after_grace(self):
        program = launching.IGNORE_SIGTERM + launching.PARENT + "time.sleep(100)"
        with self.launcher(program, "--grace_seconds=0.3") as process:
            process.terminate()
            process.communicate(timeout=launching.TIMEOUT_SECONDS)
        self.assertEqual(process.returncode, 128 + signal.SIGTERM)
        self.assert_no_orphan()

    def test_no_restart_after_signal(self):
        with self.launcher(
            launching.PARENT + "time.sleep(100)", "--max_restarts=9"
        ) as process:
            process.terminate()
            output, _ = process.communicate(timeout=launching.TIMEOUT_SECONDS)
        self.assertEqual(process.returncode, 128 + signal.SIGTERM)
        self.assertEqual(output.count("[launch]"), 1, output)
        self.assert_no_orphan()

    def test_no_restart_after_loss_and_signal(self):
        program = f"""
{launching.PARENT}
if '"index": 1' in os.environ["TF_CONFIG"]:
    while not os.path.exists(os.environ["PIDS"] + "/ready"):
        time.sleep(0.01)
    sys.exit(3)
{launching.IGNORE_SIGTERM}{launching.READY}
time.sleep(100)
"""
        with self.launcher(program, "--max_restarts=9") as process:
            # The launcher has seen the loss when only the stubborn worker is left.
            launching.wait_until(
                lambda: sum(map(launching.is_running, self.pids())) == 1
            )
            process.terminate()
            output, _ = process.communicate(timeout=launching.TIMEOUT_SECONDS)
        self.assertEqual(process.returncode, 128 + signal.SIGTERM)
        self.assertEqual(output.count("[launch]"), 1, output)
        self.assert_no_orphan()

    def test_killed_launcher_leaves_nothing(self):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        self.enter_context(mock.patch.dict(os.environ, {"TMPDIR": folder}))
        with self.launcher(
            launching.IGNORE_SIGTERM + launching.PARENT + "time.sleep(100)"
        ) as process:
            self.assertLen(os.listdir(folder), 1)
            process.kill()
            process.communicate(timeout=launching.TIMEOUT_SECONDS)
        self.assert_no_orphan()
        launching.wait_until(lambda: not os.listdir(folder))

    def test_ignored_signal_stays_ignored(self):
        handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGHUP, handler)
        with self.launcher(
            launching.PARENT + "time.sleep(0.5); print('done')"
        ) as process:
            process.send_signal(signal.SIGHUP)
            output, _ = process.communicate(timeout=launching.TIMEOUT_SECONDS)
        self.assertEqual(process.returncode, 0)
        self.assertEqual(output.count("done"), 2)

    def test_handlers_are_restored(self):
        before = [signal.getsignal(signum) for signum in launch._HANDED_ON]
        self.launch(["true"])
        after = [signal.getsignal(signum) for signum in launch._HANDED_ON]
        self.assertEqual(before, after)


if __name__ == "__main__":
    absltest.main()
