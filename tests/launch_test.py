"""Tests of what `tf_psops.launch` starts and prints, and of its arguments."""

import json
import os
import re
import subprocess
import sys
from unittest import mock

import launching
from absl import app, flags
from absl.testing import absltest, flagsaver, parameterized

from tf_psops import launch


class OutputTest(launching.LaunchTestCase):
    def test_lines_stay_whole(self):
        program = """
for i in range(5000):
    line = f"{i} " + "x" * (i % 200)
    print(line, file=[sys.stdout, sys.stderr][i % 2])
"""
        code, lines = self.launch(launching.by_index(program, program))
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
        code, lines = self.launch(launching.python(program), num_workers=1)
        self.assertEqual(code, 0)
        self.assertEqual(lines, [f"[worker 0] {line}" for line in expected])

    def test_split_character(self):
        program = """
import os, time
for byte in "é\\n".encode():
    os.write(1, bytes([byte]))
    time.sleep(0.05)
"""
        _, lines = self.launch(launching.python(program), num_workers=1)
        self.assertEqual(lines, ["[worker 0] é"])

    def test_closed_output_ends_workers(self):
        output = mock.Mock()
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
            launch.launch(launching.by_index(program), 1, output=output)
        self.assertTrue((self.pids_dir / "saved").exists())

    def test_broken_launcher_leaves_no_orphan(self):
        output = mock.Mock()
        output.write.side_effect = KeyError
        program = (
            launching.IGNORE_SIGTERM + launching.PARENT + "print('on'); time.sleep(100)"
        )
        with self.assertRaises(KeyError):
            launch.launch(launching.python(program), 1, output=output)
        self.assert_no_orphan(num_workers=1)


class EnvironmentTest(launching.LaunchTestCase):
    def test_tf_config(self):
        program = "import os; print(os.environ['TF_CONFIG'])"
        code, lines = self.launch(launching.python(program), num_workers=3)
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

    def test_addresses_are_kept_for_the_workers(self):
        program = """
import json, os, socket
config = json.loads(os.environ["TF_CONFIG"])
host, port = config["cluster"]["worker"][config["task"]["index"]].split(":")
try:
    socket.socket().bind((host, int(port)))
except OSError as error:
    print(error.strerror)
for _ in range(2):
    with socket.create_server((host, int(port))):
        print("listening")
"""
        _, lines = self.launch(launching.python(program), num_workers=1)
        lines = [line.removeprefix("[worker 0] ") for line in lines]
        self.assertEqual(lines, ["Address already in use", "listening", "listening"])

    def secrets(self, **environ):
        """Returns each worker's variables for the secret, and what the file says."""
        program = """
import os
path = os.environ.get("TF_PSOPS_SECRET_FILE", "")
mode = oct(os.stat(path).st_mode) if path else ""
text = open(path).read() if path else ""
print(os.environ.get("TF_PSOPS_SECRET", ""), path, mode, text, sep="|")
"""
        with mock.patch.dict(os.environ, environ):
            _, lines = self.launch(launching.python(program))
        return [line.split("] ")[1].split("|") for line in lines]

    def test_secret(self):
        first, second = self.secrets()
        self.assertEqual(first, second)
        variable, path, mode, text = first
        self.assertEqual((variable, mode), ("", "0o100600"))
        self.assertRegex(text, r"^[0-9a-f]{64}$")
        launching.wait_until(lambda: not os.path.exists(os.path.dirname(path)))
        self.assertNotEqual(self.secrets()[0][3], text)

    def test_secret_of_the_users_own(self):
        path = self.pids_dir / "mine"
        path.write_text("mine")
        path.chmod(0o400)
        self.assertEqual(
            self.secrets(TF_PSOPS_SECRET_FILE=str(path)),
            [["", str(path), "0o100400", "mine"]] * 2,
        )
        self.assertEqual(
            self.secrets(TF_PSOPS_SECRET="mine"), [["mine", "", "", ""]] * 2
        )

    @parameterized.parameters(
        (None, "2", "EF"), ("0", "0", "hIWEF"), ("1", "1", "WEF"), ("x", "x", "hIWEF")
    )
    def test_tensorflow_shows_errors_only(self, value, level, shown):
        program = """
import os
print("WARNING: All log messages before absl::InitializeLog() is called are written to "
      "STDERR")
for severity in "IWEF":
    print(f"{severity}0000 00:00:1795641348.907144    4386 port.cc:153] Text.")
print("I1125 21:15:01.123456 140 file.py:12] The user's own.")
print(os.environ["TF_CPP_MIN_LOG_LEVEL"])
"""
        with mock.patch.dict(os.environ):
            os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None)
            if value:
                os.environ["TF_CPP_MIN_LOG_LEVEL"] = value
            _, lines = self.launch(launching.python(program), num_workers=1)
        *lines, own, last = [line.removeprefix("[worker 0] ") for line in lines]
        first = ["h" if "absl::InitializeLog" in line else line[0] for line in lines]
        self.assertEqual("".join(first), shown)
        self.assertEndsWith(own, "own.")
        self.assertEqual(last, level)

    @parameterized.parameters((2, "2"), (3, "None"), (None, "None"))
    def test_min_workers(self, min_workers, expected):
        program = "import os; print(os.environ.get('TF_PSOPS_MIN_WORKERS'))"
        _, lines = self.launch(
            launching.python(program), num_workers=3, min_workers=min_workers
        )
        texts = [line.split("] ")[1] for line in lines]
        self.assertEqual(texts, [expected] * 3)

    def test_unbuffered(self):
        program = "import os; print('seen'); os._exit(0)"
        _, lines = self.launch(launching.python(program), num_workers=1)
        self.assertEqual(lines, ["[worker 0] seen"])


class ArgumentsTest(launching.LaunchTestCase):
    def run_launcher(self, *arguments):
        return subprocess.run(
            [*launching.LAUNCHER, *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=launching.TIMEOUT_SECONDS,
        )

    @parameterized.parameters("sleep 1", "", [[]])
    def test_bad_command(self, command):
        with self.assertRaisesRegex(ValueError, r"`command` .* Received: .* Pass"):
            launch.launch(command, 1)

    def test_bad_num_workers(self):
        with self.assertRaisesRegex(ValueError, r"`num_workers` .* Received: 0\."):
            launch.launch(["true"], 0)

    @parameterized.parameters("stall_timeout", "max_restarts")
    def test_bad_number(self, name):
        with self.assertRaisesRegex(ValueError, rf"`{name}` .* Received: -1\."):
            launch.launch(["true"], 1, **{name: -1})

    @parameterized.parameters((0, 2), (3, 2), (1, 3), (2, 5), (1.5, 2))
    def test_bad_min_workers(self, min_workers, num_workers):
        with self.assertRaisesRegex(
            ValueError,
            rf"`min_workers` .* to num_workers={num_workers}: at least half .* "
            rf"Received: {min_workers}\.",
        ):
            launch.launch(["true"], num_workers, min_workers=min_workers)

    def test_no_command(self):
        with self.assertRaisesRegex(app.UsageError, "-- python -m trainers.train"):
            launch.main(["launch"])

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
            mock.patch.object(launch, "launch", return_value=4) as function,
            mock.patch.object(sys, "stdout"),
        ):
            self.assertEqual(launch.main(argv), 4)
        function.assert_called_once_with(
            command, 3, 1.5, stall_timeout=60, max_restarts=4, min_workers=2
        )

    @parameterized.named_parameters(
        ("usage", [], 1, "Expected a command after"),
        ("num_workers", ["--num_workers=0", "--", "true"], 1, "num_workers=0"),
        ("more", ["--min_workers=3", "--", "true"], 1, "min_workers=3"),
        (
            "less_than_half",
            ["--num_workers=5", "--min_workers=2", "--", "true"],
            1,
            "at least half of --num_workers",
        ),
    )
    def test_command_line_error(self, arguments, code, message):
        result = self.run_launcher(*arguments)
        self.assertEqual(result.returncode, code)
        self.assertIn(message, result.stdout + result.stderr)

    def test_flags_after_dashes_are_the_commands(self):
        arguments = ["--num_workers=3", "--help", "--flagfile=no", "--", "-x", "a b"]
        command = launching.python("import sys; print(sys.argv[1:])")
        result = self.run_launcher("--num_workers=1", "--", *command, *arguments)
        self.assertEqual(result.stdout, f"[worker 0] {arguments}\n", result.stderr)
        self.assertEqual(result.returncode, 0)


if __name__ == "__main__":
    absltest.main()
