"""Tests of `tf_psops.launch` with real processes, small ones without TensorFlow."""

import contextlib
import errno
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from unittest import mock

from absl import app, flags
from absl.testing import absltest, flagsaver, parameterized

from tf_psops import heartbeat
from tf_psops import launch as launch_lib

_TIMEOUT_SECONDS = 60
# Runs the launcher without `tf_psops/__init__.py`, which imports TensorFlow.
_LAUNCHER = [sys.executable, launch_lib.__file__]
# Starts a child in its own process group, and notes both process ids in $PIDS.
_PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen(["sleep", "100"])
open(f"{os.environ['PIDS']}/{os.getpid()}-{child.pid}", "w").close()
"""
# For one worker to say that it is ready, and for another to wait for that.
_READY = "open(os.environ['PIDS'] + '/ready', 'w').close()\n"
_AWAIT_READY = """
while not os.path.exists(os.environ["PIDS"] + "/ready"):
    time.sleep(0.01)
"""
_BEAT = f"import runpy; beat = runpy.run_path({heartbeat.__file__!r})['beat']\n"
# Counts how many times this worker has been started, from 1.
_COUNT = """
with open(f"{os.environ['PIDS']}/{index}", "a") as file:
    file.write(".")
    attempt = file.tell()
"""
_IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def setUpModule():
    # A test run in the background may ignore SIGINT, and its children with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _python(program):
    return [sys.executable, "-c", program]


def _by_index(*programs):
    """Returns a command that runs `programs[i]` in worker `i`."""
    return _python(
        "import json, os, signal, sys, time\n"
        "index = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"
        f"exec({programs!r}[index])"
    )


def _is_running(pid):
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESRCH):
            raise
        return False
    return state[0] != "Z"


def _wait_until(condition):
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


class LaunchTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.pids_dir = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        self.enter_context(
            absltest.mock.patch.dict(os.environ, {"PIDS": str(self.pids_dir)})
        )
        handler = signal.signal(signal.SIGALRM, self._time_out)
        self.addCleanup(signal.signal, signal.SIGALRM, handler)
        self.addCleanup(signal.alarm, 0)
        signal.alarm(_TIMEOUT_SECONDS)

    def _time_out(self, signum, frame):
        raise TimeoutError(f"{self.id()} hangs")

    def launch(self, command, num_workers=2, grace_seconds=10.0, **options):
        output = io.StringIO()
        code = launch_lib.launch(command, num_workers, grace_seconds, output, **options)
        return code, output.getvalue().splitlines()

    def pids(self):
        names = [path.name for path in self.pids_dir.glob("*-*")]
        return [int(pid) for name in names for pid in name.split("-")]

    def assert_no_orphan(self, num_workers=2):
        self.assertLen(self.pids(), 2 * num_workers)
        _wait_until(lambda: not any(map(_is_running, self.pids())))


class OutputTest(LaunchTestCase):
    def test_lines_stay_whole(self):
        program = """
for i in range(5000):
    line = f"{i} " + "x" * (i % 200)
    print(line, file=[sys.stdout, sys.stderr][i % 2])
"""
        code, lines = self.launch(_by_index(program, program))
        self.assertEqual(code, 0)
        expected = [f"{i} " + "x" * (i % 200) for i in range(5000)]
        for index in range(2):
            prefix = f"[worker {index}] "
            mine = [line[len(prefix) :] for line in lines if line.startswith(prefix)]
            self.assertEqual(mine, expected)
        self.assertLen(lines, 10000)

    @parameterized.named_parameters(
        ("no_newline", b"a\nb", ["a", "b"]),
        ("progress_bar", b"1/2\b\b\b\r2/2\b\b\b\r\r\ndone\r\n", ["1/2", "2/2", "done"]),
        ("blank_lines", b"\n\na\n\n", ["a"]),
        ("undecodable", b"a\xffb\n\xe2\x82", ["a\ufffdb", "\ufffd"]),
        ("long", b"x" * 100_000, ["x" * 100_000]),
        ("nothing", b"", []),
    )
    def test_pieces(self, data, expected):
        program = f"import sys; sys.stdout.buffer.write({data!r})"
        code, lines = self.launch(_python(program), num_workers=1)
        self.assertEqual(code, 0)
        self.assertEqual(lines, [f"[worker 0] {line}" for line in expected])

    def test_split_character(self):
        program = """
import os, time
for byte in "é\\n".encode():
    os.write(1, bytes([byte]))
    time.sleep(0.05)
"""
        _, lines = self.launch(_python(program), num_workers=1)
        self.assertEqual(lines, ["[worker 0] é"])

    def test_closed_output_ends_workers(self):
        output = absltest.mock.Mock()
        output.write.side_effect = BrokenPipeError
        program = """
import pathlib, signal, sys
def save(*_):
    print("saving")
    pathlib.Path(os.environ["PIDS"], "saved").touch()
    sys.exit()
signal.signal(signal.SIGTERM, save)
print("ready")
time.sleep(100)
"""
        with self.assertRaises(BrokenPipeError):
            launch_lib.launch(_by_index(program), 1, output=output)
        self.assertTrue((self.pids_dir / "saved").exists())

    def test_broken_launcher_leaves_no_orphan(self):
        output = absltest.mock.Mock()
        output.write.side_effect = KeyError
        program = _IGNORE_SIGTERM + _PARENT + "print('on'); time.sleep(100)"
        with self.assertRaises(KeyError):
            launch_lib.launch(_python(program), 1, output=output)
        self.assert_no_orphan(num_workers=1)


class EnvironmentTest(LaunchTestCase):
    def test_tf_config(self):
        program = "import os; print(os.environ['TF_CONFIG'])"
        code, lines = self.launch(_python(program), num_workers=3)
        self.assertEqual(code, 0)
        configs = {}
        for line in lines:
            index, text = re.fullmatch(r"\[worker (\d)\] (.*)", line).groups()
            configs[int(index)] = json.loads(text)
        addresses = configs[0]["cluster"]["worker"]
        self.assertLen(set(addresses), 3)
        for address in addresses:
            self.assertRegex(address, r"^127\.0\.0\.1:\d+$")
        for index in range(3):
            self.assertEqual(
                configs[index],
                {
                    "cluster": {"worker": addresses},
                    "task": {"type": "worker", "index": index},
                },
            )

    def test_unbuffered(self):
        program = "import os; print('seen'); os._exit(0)"
        _, lines = self.launch(_python(program), num_workers=1)
        self.assertEqual(lines, ["[worker 0] seen"])


class ExitCodeTest(LaunchTestCase):
    def test_first_failure_ends_others(self):
        code, lines = self.launch(
            _by_index(
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
            _by_index("os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(100)")
        )
        self.assertEqual(code, 128 + signal.SIGKILL)
        self.assertEqual(lines, ["[launch] worker 0 was ended by signal 9 (Killed)"])

    def test_kills_after_grace(self):
        stubborn = _IGNORE_SIGTERM + _READY + "time.sleep(100)"
        fails = _AWAIT_READY + "sys.exit(3)"
        start = time.monotonic()
        code, lines = self.launch(_by_index(stubborn, fails), grace_seconds=0.5)
        self.assertEqual(code, 3)
        self.assertBetween(time.monotonic() - start, 0.5, 9)
        self.assertEqual(lines[-1], "[launch] worker 1 failed with exit code 3")

    def test_graceful_end_does_not_hide_failure(self):
        graceful = f"""
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(5)))
{_READY}
time.sleep(100)
"""
        code, lines = self.launch(_by_index(graceful, _AWAIT_READY + "sys.exit(3)"))
        self.assertEqual(code, 3)
        self.assertIn("[worker 0] saved", lines)

    def test_left_behind_is_ended(self):
        code, lines = self.launch(_python(_PARENT), grace_seconds=2)
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
child = subprocess.Popen({_python(child)!r}, stdout=subprocess.PIPE)
child.stdout.read(5)
"""
        code, _ = self.launch(_python(wrapper), num_workers=1, grace_seconds=2)
        self.assertEqual(code, 0)
        self.assertTrue((self.pids_dir / "saved").exists())

    def test_cannot_start(self):
        code, lines = self.launch(["/no/such/program"])
        self.assertEqual(code, 127)
        self.assertLen(lines, 1)
        self.assertRegex(lines[0], "cannot start '/no/such/program': .* Check the")

    def test_cannot_start_second_worker(self):
        real, calls = launch_lib._Worker, []

        def worker(index, *args):
            calls.append(index)
            if index == 1:
                raise FileNotFoundError(errno.ENOENT, "gone")
            return real(index, *args)

        with absltest.mock.patch.object(launch_lib, "_Worker", worker):
            code, _ = self.launch(["sleep", "100"], num_workers=3)
        self.assertEqual(code, 127)
        self.assertEqual(calls, [0, 1])


class StallTest(LaunchTestCase):
    def test_silent_worker_is_lost(self):
        noisy = "while True: print('on'); time.sleep(0.1)"
        code, lines = self.launch(_by_index(noisy, "time.sleep(100)"), stall_timeout=2)
        self.assertEqual(code, 124)
        self.assertEqual(
            lines[-1],
            "[launch] worker 1 made no progress for stall_timeout=2 seconds",
        )

    def test_output_and_beats_are_progress(self):
        work = "for _ in range(40): time.sleep(0.1); "
        code, lines = self.launch(
            _by_index(work + "print('.', end='')", _BEAT + work + "beat()"),
            stall_timeout=2.5,
        )
        self.assertEqual(code, 0, lines)
        self.assertEqual(lines, ["[worker 0] " + 40 * "."])

    def test_stopped_worker_is_asked_to_end(self):
        program = """
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit()))
os.kill(os.getpid(), signal.SIGSTOP)
"""
        code, lines = self.launch(_by_index(program), num_workers=1, stall_timeout=1)
        self.assertEqual(code, 124)
        self.assertIn("[worker 0] saved", lines)

    def test_no_stall_while_launcher_is_held_up(self):
        class Terminal(io.StringIO):
            def write(self, text):
                if "hold" in text:
                    time.sleep(3)
                return super().write(text)

        # The second worker's lines wait while the first one's cannot be shown.
        lively = _READY + "for _ in range(40): print('on'); time.sleep(0.1)"
        output = Terminal()
        code = launch_lib.launch(
            _by_index(_AWAIT_READY + "print('hold')", lively),
            num_workers=2,
            output=output,
            stall_timeout=2,
        )
        self.assertEqual(code, 0, output.getvalue())


class RestartTest(LaunchTestCase):
    @parameterized.named_parameters(
        ("exit_code", "sys.exit(3)", "failed with exit code 3"),
        ("preempted", "os.kill(os.getpid(), signal.SIGTERM)", "was ended by signal 15"),
        ("stopped", "os.kill(os.getpid(), signal.SIGSTOP)", "made no progress for"),
    )
    def test_after_loss(self, loss, reason):
        show = "print(attempt, os.environ['TF_CONFIG'])\n"
        code, lines = self.launch(
            _by_index(
                _COUNT + show + _AWAIT_READY,
                f"{_COUNT}{show}\nif attempt == 1: {loss}\n{_READY}",
            ),
            stall_timeout=2.5,
            max_restarts=3,
        )
        self.assertEqual(code, 0, lines)
        launch_lines = [line for line in lines if line.startswith("[launch]")]
        self.assertLen(launch_lines, 4)
        self.assertRegex(launch_lines[0], rf"^\[launch\] worker \d {reason}")
        self.assertStartsWith(launch_lines[1], "[launch] restart 1 of 3")
        self.assertEqual(launch_lines[2], "[launch] restarts: 1, workers at the end: 2")
        self.assertRegex(launch_lines[3], rf"^\[launch\] restart 1: worker \d {reason}")
        clusters = [
            json.loads(line.split(" ", 3)[3])["cluster"]["worker"]
            for line in lines
            if line.startswith("[worker 1]")
        ]
        self.assertLen(clusters, 2)
        self.assertNotEqual(*clusters)

    def test_bounded(self):
        code, lines = self.launch(
            _by_index("time.sleep(100)", _COUNT + "sys.exit(attempt)"), max_restarts=2
        )
        self.assertEqual(code, 3)
        self.assertEqual(
            lines[-4:],
            [
                "[launch] worker 1 failed with exit code 3",
                "[launch] restarts: 2, workers at the end: 2",
                "[launch] restart 1: worker 1 failed with exit code 1",
                "[launch] restart 2: worker 1 failed with exit code 2",
            ],
        )

    def test_nothing_to_restart(self):
        code, lines = self.launch(["true"], max_restarts=3)
        self.assertEqual((code, lines), (0, []))

    def test_cannot_start(self):
        code, lines = self.launch(["/no/such/program"], max_restarts=3)
        self.assertEqual(code, 127)
        self.assertLen(lines, 1)

    def test_leaves_no_orphan_and_waits_little(self):
        start = _COUNT + _PARENT
        stubborn = _IGNORE_SIGTERM + _READY + "if attempt == 1: time.sleep(100)"
        fails_once = _AWAIT_READY + "if attempt == 1: sys.exit(3)"
        with absltest.mock.patch.object(launch_lib, "_RESTART_GRACE_SECONDS", 0.3):
            code, lines = self.launch(
                _by_index(start + stubborn, start + fails_once),
                grace_seconds=100,
                max_restarts=1,
            )
        self.assertEqual(code, 0, lines)
        self.assert_no_orphan(num_workers=4)

    def numbers_of_workers(self, program, **options):
        """Returns the exit code and each restart's number of workers; first it is 3."""
        program = f"""
workers = len(json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"])
{_COUNT}{program}
"""
        code, lines = self.launch(
            _by_index(*[program] * 3), num_workers=3, max_restarts=4, **options
        )
        numbers = re.findall(r"restart \d of 4, workers: (\d)", "\n".join(lines))
        self.assertIn(
            f"[launch] restarts: {len(numbers)}, workers at the end: {numbers[-1]}",
            lines,
        )
        return code, "".join(numbers)

    def test_a_worker_that_fails_while_it_is_looked_at(self):
        def slow(method):
            def look(*args):
                result = method(*args)
                time.sleep(0.3)
                return result

            return look

        worker = launch_lib._Worker
        with (
            mock.patch.object(worker, "find_loss", slow(worker.find_loss)),
            mock.patch.object(worker, "is_running", slow(worker.is_running)),
        ):
            for delay in (0.2, 0.35, 0.5, 0.65):
                program = f"time.sleep({delay}); sys.exit(3)"
                code, _ = self.launch(_by_index(program), num_workers=1)
                self.assertEqual(code, 3, delay)

    def test_goes_on_with_fewer_workers(self):
        program = "if workers == 3: sys.exit(3) if index == 2 else time.sleep(100)"
        result = self.numbers_of_workers(program, min_workers=1)
        self.assertEqual(result, (0, "32"))

    @parameterized.named_parameters(
        ("fewer", "", 1, "3211"),
        ("not_below_min_workers", "", 2, "3222"),
        ("not_by_default", "", None, "3333"),
        ("not_after_progress", _BEAT + "beat()", 1, "3333"),
    )
    def test_always_the_same_worker(self, program, min_workers, numbers):
        program += "\nsys.exit(3) if index == 0 else time.sleep(100)"
        result = self.numbers_of_workers(program, min_workers=min_workers)
        self.assertEqual(result, (3, numbers))

    def test_never_the_same_worker(self):
        program = """
def has_started(worker):
    path = f"{os.environ['PIDS']}/{worker}"
    return os.path.exists(path) and os.path.getsize(path) == attempt
while not all(map(has_started, range(3))):
    time.sleep(0.01)
sys.exit(3) if index == attempt % 2 else time.sleep(100)
"""
        result = self.numbers_of_workers(program, min_workers=1)
        self.assertEqual(result, (3, "3333"))


class ArgumentsTest(LaunchTestCase):
    @parameterized.parameters("sleep 1", "", [[]])
    def test_bad_command(self, command):
        with self.assertRaisesRegex(ValueError, r"`command` .* Received: .* Pass"):
            launch_lib.launch(command, 1)

    def test_bad_num_workers(self):
        with self.assertRaisesRegex(ValueError, r"`num_workers` .* Received: 0\."):
            launch_lib.launch(["true"], 0)

    @parameterized.parameters("stall_timeout", "max_restarts")
    def test_bad_number(self, name):
        with self.assertRaisesRegex(ValueError, rf"`{name}` .* Received: -1\."):
            launch_lib.launch(["true"], 1, **{name: -1})

    @parameterized.parameters(0, 3)
    def test_bad_min_workers(self, min_workers):
        with self.assertRaisesRegex(
            ValueError, rf"`min_workers` .*num_workers=2. Received: {min_workers}\."
        ):
            launch_lib.launch(["true"], 2, min_workers=min_workers)

    def test_no_command(self):
        with self.assertRaisesRegex(app.UsageError, "-- python -m trainers.train"):
            launch_lib.main(["launch"])

    @flagsaver.flagsaver
    def test_main_passes_flags(self):
        command = ["python", "x.py", "--num_workers=5"]
        argv = flags.FLAGS(
            [
                *("launch", "--num_workers=3", "--grace_seconds=1.5"),
                *("--stall_timeout=60", "--max_restarts=4", "--min_workers=2"),
                *("--", *command),
            ]
        )
        with (
            absltest.mock.patch.object(launch_lib, "launch", return_value=4) as launch,
            absltest.mock.patch.object(sys, "stdout"),
        ):
            self.assertEqual(launch_lib.main(argv), 4)
        launch.assert_called_once_with(
            command, 3, 1.5, stall_timeout=60, max_restarts=4, min_workers=2
        )

    @parameterized.named_parameters(
        ("usage", [], 1, "Expected a command after"),
        ("num_workers", ["--num_workers=0", "--", "true"], 1, "num_workers=0"),
        ("min_workers", ["--min_workers=3", "--", "true"], 1, "min_workers=3"),
    )
    def test_command_line_error(self, arguments, code, message):
        result = subprocess.run(
            [*_LAUNCHER, *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
        self.assertEqual(result.returncode, code)
        self.assertIn(message, result.stdout + result.stderr)

    def test_flags_after_dashes_are_the_commands(self):
        arguments = ["--num_workers=3", "--help", "--flagfile=no", "--", "-x", "a b"]
        result = subprocess.run(
            [
                *(*_LAUNCHER, "--num_workers=1", "--"),
                *_python("import sys; print(sys.argv[1:])"),
                *arguments,
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
        self.assertEqual(result.stdout, f"[worker 0] {arguments}\n", result.stderr)
        self.assertEqual(result.returncode, 0)


class SignalTest(LaunchTestCase):
    @contextlib.contextmanager
    def launcher(self, program, *arguments):
        """Yields a launcher of two workers once both run and have a child."""
        with subprocess.Popen(
            [*_LAUNCHER, *arguments, "--", *_python(program)],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                _wait_until(lambda: len(self.pids()) == 4)
                yield process
            finally:
                process.kill()

    @parameterized.parameters(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    def test_handed_on(self, signum):
        program = f"""
import signal, sys
signal.signal({int(signum)}, lambda *_: (print("saved"), sys.exit(0)))
{_PARENT}
time.sleep(100)
"""
        with self.launcher(program) as process:
            process.send_signal(signum)
            output, _ = process.communicate(timeout=_TIMEOUT_SECONDS)
        self.assertEqual(process.returncode, 128 + signum)
        *lines, last = output.splitlines()
        self.assertCountEqual(lines, ["[worker 0] saved", "[worker 1] saved"])
        self.assertStartsWith(last, f"[launch] received signal {int(signum)} (")
        self.assert_no_orphan()

    def test_kills_after_grace(self):
        program = _IGNORE_SIGTERM + _PARENT + "time.sleep(100)"
        with self.launcher(program, "--grace_seconds=0.3") as process:
            process.terminate()
            process.communicate(timeout=_TIMEOUT_SECONDS)
        self.assertEqual(process.returncode, 128 + signal.SIGTERM)
        self.assert_no_orphan()

    def test_no_restart_after_signal(self):
        with self.launcher(_PARENT + "time.sleep(100)", "--max_restarts=9") as process:
            process.terminate()
            output, _ = process.communicate(timeout=_TIMEOUT_SECONDS)
        self.assertEqual(process.returncode, 128 + signal.SIGTERM)
        self.assertEqual(output.count("[launch]"), 1, output)
        self.assert_no_orphan()

    def test_no_restart_after_loss_and_signal(self):
        program = f"""
{_PARENT}
if '"index": 1' in os.environ["TF_CONFIG"]:
    while not os.path.exists(os.environ["PIDS"] + "/ready"):
        time.sleep(0.01)
    sys.exit(3)
{_IGNORE_SIGTERM}{_READY}
time.sleep(100)
"""
        with self.launcher(program, "--max_restarts=9") as process:
            # The launcher has seen the loss when only the stubborn worker is left.
            _wait_until(lambda: sum(map(_is_running, self.pids())) == 1)
            process.terminate()
            output, _ = process.communicate(timeout=_TIMEOUT_SECONDS)
        self.assertEqual(process.returncode, 128 + signal.SIGTERM)
        self.assertEqual(output.count("[launch]"), 1, output)
        self.assert_no_orphan()

    def test_killed_launcher_leaves_nothing(self):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        self.enter_context(absltest.mock.patch.dict(os.environ, {"TMPDIR": folder}))
        with self.launcher(_IGNORE_SIGTERM + _PARENT + "time.sleep(100)") as process:
            self.assertLen(os.listdir(folder), 1)
            process.kill()
            process.communicate(timeout=_TIMEOUT_SECONDS)
        self.assert_no_orphan()
        _wait_until(lambda: not os.listdir(folder))

    def test_ignored_signal_stays_ignored(self):
        handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.addCleanup(signal.signal, signal.SIGHUP, handler)
        with self.launcher(_PARENT + "time.sleep(0.5); print('done')") as process:
            process.send_signal(signal.SIGHUP)
            output, _ = process.communicate(timeout=_TIMEOUT_SECONDS)
        self.assertEqual(process.returncode, 0)
        self.assertEqual(output.count("done"), 2)

    def test_handlers_are_restored(self):
        before = [signal.getsignal(signum) for signum in launch_lib._HANDED_ON]
        self.launch(["true"])
        after = [signal.getsignal(signum) for signum in launch_lib._HANDED_ON]
        self.assertEqual(before, after)


if __name__ == "__main__":
    absltest.main()
