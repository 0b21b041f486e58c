"""Tests of how `tf_psops.launch` restarts a lost worker while the others run on."""

import os
import signal
import subprocess
import sys
from unittest import mock

import launching
from absl.testing import absltest, parameterized

from tf_psops import heartbeat
from tf_psops.launcher import restarts

# Counts how many times this worker has been started, from 1, and tells of that.
_START = f"""
import runpy; beat = runpy.run_path({heartbeat.__file__!r})["beat"]
with open(f"{{os.environ['PIDS']}}/{{index}}", "a") as file:
    file.write(".")
    attempt = file.tell()
print("start", os.environ["TF_CONFIG"])
"""
_KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def _worker(first, *later):
    """Returns a program that does `later[i]` in its i-th restart, `first` at first."""
    return f"{_START}exec({[first, *later]!r}[attempt - 1])"


def _await_starts(index, count):
    """Returns a program that waits until a worker has been started so many times."""
    return f"""
path = f"{{os.environ['PIDS']}}/{index}"
while not os.path.exists(path) or os.path.getsize(path) < {count}:
    time.sleep(0.01)
"""


def _beat_until(name):
    """Returns a program that makes progress until there is such a file."""
    return f"""
while not os.path.exists(f"{{os.environ['PIDS']}}/{name}"):
    beat()
    time.sleep(0.01)
"""


class LaunchMinWorkersTest(launching.LaunchTestCase):
    def launch(self, *programs, **options):
        """Returns the exit code, all lines and those of the launcher itself."""
        options = {"min_workers": 2, "max_restarts": 9, **options}
        code, lines = super().launch(
            launching.by_index(*programs), len(programs), **options
        )
        own = [line[len("[launch] ") :] for line in lines if "[launch] " in line]
        return code, lines, own

    def without_delays(self):
        self.enter_context(
            mock.patch.object(restarts.Restarts, "delay", return_value=0)
        )

    @parameterized.named_parameters(
        ("exit_code", "sys.exit(3)", "worker 1 failed with exit code 3"),
        ("killed", _KILL, "worker 1 was ended by signal 9 (Killed)"),
        (
            "preempted",
            "os.kill(os.getpid(), signal.SIGTERM)",
            "worker 1 was ended by signal 15 (Terminated)",
        ),
        (
            "stopped",
            "os.kill(os.getpid(), signal.SIGSTOP)",
            "worker 1 made no progress for stall_timeout=2.5 seconds",
        ),
    )
    def test_restarts_the_lost_worker_alone(self, loss, reason):
        work = _START + _beat_until("ready")
        code, lines, own = self.launch(
            work,
            _worker(loss, launching.READY),
            work,
            stall_timeout=2.5,
        )
        self.assertEqual(code, 0, lines)
        restart = "restart 1 of 9: worker 1"
        summary = "restarts: 1, workers at the end: 3"
        self.assertEqual(own, [reason, restart, summary, f"restart 1: {reason}"])
        starts = [line for line in lines if " start " in line]
        mine = [line for line in starts if line.startswith("[worker 1]")]
        self.assertLen(starts, 4)
        self.assertLen(mine, 2)
        self.assertEqual(*mine)

    def test_the_first_that_stops_is_to_blame(self):
        """The others are silent soon after, because they wait for it."""
        later = "\nfor _ in range(20): beat(); time.sleep(0.1)\n"
        wait = _START + _beat_until("stopped") + later + launching.AWAIT_READY
        stop = """
open(os.environ['PIDS'] + '/stopped', 'w').close()
os.kill(os.getpid(), signal.SIGSTOP)
"""
        code, lines, own = self.launch(
            wait,
            _worker(
                _await_starts(0, 1) + _await_starts(2, 1) + stop,
                "time.sleep(1)\n" + launching.READY,
            ),
            wait,
            stall_timeout=4,
        )
        self.assertEqual(code, 0, lines)
        self.assertEqual(own[1:3], ["restart 1 of 9: worker 1", own[-2]])

    def test_goes_on_without_one_that_does_not_come_back(self):
        self.without_delays()
        wait = f"{_START}beat(){_await_starts(1, 6)}time.sleep(1)"
        losses = ["beat(); time.sleep(0.2); sys.exit(3)"] + ["sys.exit(4)"] * 5
        code, lines, own = self.launch(wait, _worker(*losses), wait)
        self.assertEqual(code, 0, lines)
        self.assertEqual(
            own[-7:-5],
            [
                "worker 1 stays away: lost 5 times in a row before its first beat",
                "restarts: 5, workers at the end: 2",
            ],
            own,
        )

    def test_waits_longer_from_time_to_time(self):
        own_restarts = restarts.Restarts(9)
        obstacles, delays = [], []
        for has_beaten in (False, False, True, False, False, False, False, False):
            obstacles.append(own_restarts.find_obstacle(0, has_beaten))
            delays.append(own_restarts.delay(0))
        self.assertEqual(delays[:7], [0, 1, 0, 0, 1, 2, 4])
        self.assertEqual(obstacles[:7], [""] * 7)
        self.assertRegex(obstacles[7], "lost 5 times in a row")
        self.assertEqual(own_restarts.find_obstacle(1, False), "")

    def test_counts_for_all_workers_together(self):
        self.without_delays()
        wait = launching.AWAIT_READY + "time.sleep(1)"
        code, lines, own = self.launch(
            wait,
            _worker(_KILL, wait),
            _worker(_KILL, _KILL, _await_starts(1, 2) + launching.READY + wait),
            launching.AWAIT_READY + "sys.exit(7)",
            max_restarts=3,
        )
        self.assertIn("worker 3 stays away: no restart is left", own, lines)
        self.assertIn("restarts: 3, workers at the end: 3", own)
        self.assertEqual(code, 0)

    def test_fails_below_min_workers(self):
        self.without_delays()
        graceful = """
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
time.sleep(100)
"""
        code, lines, own = self.launch(
            graceful,
            "sys.exit(5)",
            "time.sleep(1); sys.exit(6)",
            max_restarts=1,
        )
        self.assertEqual(code, 6, lines)
        self.assertIn("[worker 0] saved", lines)
        self.assertEqual(
            own[-3:],
            [
                "1 of min_workers=2 workers are left",
                "restarts: 1, workers at the end: 1",
                "restart 1: worker 1 failed with exit code 5",
            ],
            own,
        )

    def test_one_that_has_finished_is_not_restarted(self):
        code, lines, own = self.launch(
            "sys.exit(0)", _START, _worker("time.sleep(0.5); sys.exit(3)", "sys.exit()")
        )
        self.assertEqual(code, 0, lines)
        self.assertEqual(
            own,
            [
                "worker 2 failed with exit code 3",
                "worker 2 stays away: the others have finished",
            ],
        )
        self.assertLen([line for line in lines if " start " in line], 2)

    def test_one_that_comes_when_the_others_have_finished(self):
        work = _START + "beat(); time.sleep(1)"
        code, lines, own = self.launch(
            work, work, _worker(f"beat(); {_KILL}", "time.sleep(100)"), grace_seconds=2
        )
        self.assertEqual(code, 0, lines)
        self.assertEqual(
            own[2:4],
            [
                "worker 2 came after the others had finished",
                "restarts: 1, workers at the end: 2",
            ],
        )

    def test_a_late_one_may_end_by_itself(self):
        work = _START + "beat(); time.sleep(0.5)"
        late = "beat(); time.sleep(3); print('ended')"
        code, lines, _ = self.launch(
            work, work, _worker(f"beat(); {_KILL}", late), grace_seconds=1
        )
        self.assertEqual(code, 0, lines)
        self.assertIn("[worker 2] ended", lines)

    def test_nothing_of_the_lost_one_is_left_when_it_starts_again(self):
        look = """
children = [int(name.split("-")[1]) for name in os.listdir(os.environ["PIDS"])
            if "-" in name]
for child in children:
    state = open(f"/proc/{child}/stat").read() if os.path.exists(
        f"/proc/{child}") else ") Z"
    print("child", state.rpartition(")")[2].split()[0])
"""
        ignore = launching.IGNORE_SIGTERM + launching.PARENT
        code, lines, _ = self.launch(
            _START + launching.AWAIT_READY,
            _worker(ignore + _KILL, look + launching.READY),
            min_workers=1,
        )
        self.assertEqual(code, 0, lines)
        self.assertIn("[worker 1] child Z", lines)

    def test_a_command_that_is_gone_at_a_restart(self):
        self.without_delays()
        command = f"{self.pids_dir}/python"
        os.symlink(sys.executable, command)
        program = f"""
import json, os, sys, time
time.sleep(0.5)
if json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 1:
    os.unlink({command!r})
    sys.exit(3)
time.sleep(1)
"""
        code, lines = super().launch(
            [command, "-c", program], num_workers=2, min_workers=1, max_restarts=9
        )
        self.assertEqual(code, 0, lines)
        self.assertIn("[launch] restarts: 4, workers at the end: 1", lines)

    def test_a_signal_ends_all(self):
        handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.addCleanup(signal.signal, signal.SIGTERM, handler)
        program = f"""
{launching.PARENT}
if '"index": 1' in os.environ["TF_CONFIG"]:
    sys.exit(3)
time.sleep(100)
"""
        arguments = ["--num_workers=2", "--min_workers=1", "--max_restarts=9"]
        with subprocess.Popen(
            [*launching.LAUNCHER, *arguments, "--", *launching.python(program)],
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            # The fourth attempt of worker 1 waits.
            launching.wait_until(lambda: len(self.pids()) == 2 * 4)
            process.terminate()
            output, _ = process.communicate(timeout=launching.TIMEOUT_SECONDS)
        self.assertEqual(process.returncode, 128 + signal.SIGTERM, output)
        launching.wait_until(lambda: not any(map(launching.is_running, self.pids())))


if __name__ == "__main__":
    absltest.main()
