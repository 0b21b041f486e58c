"""Tests of how `tf_psops.launch` notices a stalled worker, and how it restarts."""

import io
import json
import time
from unittest import mock

import launching
from absl.testing import absltest, parameterized

from tf_psops import heartbeat, launch
from tf_psops.launcher import worker_group

_BEAT = f"import runpy; beat = runpy.run_path({heartbeat.__file__!r})['beat']\n"
# Counts how many times this worker has been started, from 1.
_COUNT = """
with open(f"{os.environ['PIDS']}/{index}", "a") as file:
    file.write(".")
    attempt = file.tell()
"""


class StallTest(launching.LaunchTestCase):
    def test_silent_worker_is_lost(self):
        noisy = "while True: print('on'); time.sleep(0.1)"
        code, lines = self.launch(
            launching.by_index(noisy, "time.sleep(100)"), stall_timeout=2
        )
        self.assertEqual(code, 124)
        self.assertEqual(
            lines[-1],
            "[launch] worker 1 made no progress for stall_timeout=2 seconds",
        )

    def test_output_and_beats_are_progress(self):
        work = "for _ in range(40): time.sleep(0.1); "
        code, lines = self.launch(
            launching.by_index(work + "print('.', end='')", _BEAT + work + "beat()"),
            stall_timeout=2.5,
        )
        self.assertEqual(code, 0, lines)
        self.assertEqual(lines, ["[worker 0] " + 40 * "."])

    def test_stopped_worker_is_asked_to_end(self):
        program = """
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit()))
os.kill(os.getpid(), signal.SIGSTOP)
"""
        code, lines = self.launch(
            launching.by_index(program), num_workers=1, stall_timeout=1
        )
        self.assertEqual(code, 124)
        self.assertIn("[worker 0] saved", lines)

    def test_no_stall_while_launcher_is_held_up(self):
        class Terminal(io.StringIO):
            def write(self, text):
                if "hold" in text:
                    time.sleep(3)
                return super().write(text)

        # The second worker's lines wait while the first one's cannot be shown.
        lively = launching.READY + "for _ in range(40): print('on'); time.sleep(0.1)"
        output = Terminal()
        code = launch.launch(
            launching.by_index(launching.AWAIT_READY + "print('hold')", lively),
            num_workers=2,
            output=output,
            stall_timeout=2,
        )
        self.assertEqual(code, 0, output.getvalue())


class RestartTest(launching.LaunchTestCase):
    @parameterized.named_parameters(
        ("exit_code", "sys.exit(3)", "failed with exit code 3"),
        ("preempted", "os.kill(os.getpid(), signal.SIGTERM)", "was ended by signal 15"),
        ("stopped", "os.kill(os.getpid(), signal.SIGSTOP)", "made no progress for"),
    )
    def test_after_loss(self, loss, reason):
        show = "print(attempt, os.environ['TF_CONFIG'])\n"
        code, lines = self.launch(
            launching.by_index(
                _COUNT + show + launching.AWAIT_READY,
                f"{_COUNT}{show}\nif attempt == 1: {loss}\n{launching.READY}",
            ),
            stall_timeout=2.5,
            max_restarts=3,
        )
        self.assertEqual(code, 0, lines)
        launch_lines = [line for line in lines if line.startswith("[launch]")]
        self.assertLen(launch_lines, 4)
        self.assertRegex(launch_lines[0], rf"^\[launch\] worker \d {reason}")
        self.assertEqual(launch_lines[1], "[launch] restart 1 of 3: all workers")
        self.assertEqual(launch_lines[2], "[launch] restarts: 1")
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
            launching.by_index("time.sleep(100)", _COUNT + "sys.exit(attempt)"),
            max_restarts=2,
        )
        self.assertEqual(code, 3)
        self.assertEqual(
            lines[-4:],
            [
                "[launch] worker 1 failed with exit code 3",
                "[launch] restarts: 2",
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
        start = _COUNT + launching.PARENT
        stubborn = (
            launching.IGNORE_SIGTERM
            + launching.READY
            + "if attempt == 1: time.sleep(100)"
        )
        fails_once = launching.AWAIT_READY + "if attempt == 1: sys.exit(3)"
        with mock.patch.object(worker_group, "_RESTART_GRACE_SECONDS", 0.3):
            code, lines = self.launch(
                launching.by_index(start + stubborn, start + fails_once),
                grace_seconds=100,
                max_restarts=1,
            )
        self.assertEqual(code, 0, lines)
        self.assert_no_orphan(num_workers=4)


if __name__ == "__main__":
    absltest.main()
