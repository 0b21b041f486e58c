"""Tests of `examples/ray` under a real Ray of one node on this machine."""

import importlib.util
import pathlib
import re
import shutil
import signal
import sys
import tempfile

import keras
import machines
import pytest
from absl.testing import absltest

_SECONDS = 500
# What `ray start --head` does, in a network where nothing else is. The first worker
# that has reported an epoch gets a signal, if one is given.
_DRIVER = """
import os, pathlib, runpy, signal, sys, threading, time
import ray

number = int(sys.argv.pop(1))
ray.init(_node_ip_address="198.51.100.1", include_dashboard=False, num_cpus=3,
         object_store_memory=100 << 20)

def workers():
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"RayTrainWorker" in path.read_bytes():
                yield int(path.parent.name)
        except OSError:
            pass

def kill(storage):
    while not list(storage.glob("digits/checkpoint_*/model.keras")):
        time.sleep(0.1)
    worker = max(workers())
    print("signal", number, "to", worker)
    os.kill(worker, number)

if number:
    storage = pathlib.Path(sys.argv[1].removeprefix("--storage="))
    threading.Thread(target=kill, args=[storage], daemon=True).start()
sys.argv[0] = "examples/ray/train_digits.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.timeout(1600)
class RayTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        if not importlib.util.find_spec("ray"):
            self.skipTest('There is no ray. Install the extra "engines".')
        if reason := machines.why_not():
            self.skipTest(reason)
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def train(self, number):
        """Runs the example, and returns its output and the weights that it leaves."""
        driver = self.folder / "driver.py"
        driver.write_text(_DRIVER)
        storage = f"--storage={self.folder}"
        command = [sys.executable, driver, int(number), storage]
        environ = {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_TMPDIR": str(self.folder / "ray"),
        }
        with machines.network(self.folder, command, **environ) as process:
            code = process.wait(_SECONDS)
        output = (self.folder / "output").read_text()
        self.assertEqual(code, 0, output)
        (checkpoint,) = re.findall("^checkpoint (.*)", output, re.MULTILINE)
        model = keras.models.load_model(pathlib.Path(checkpoint, "model.keras"))
        return output, [w.tolist() for w in model.get_weights()]

    def test_a_worker_that_dies_costs_the_group_a_restart(self):
        output, uncut = self.train(0)
        self.assertIn("Python tells only its main thread of signals", output)
        self.assertRegex(output, r"accuracy 0\.9[67]")
        for number in signal.SIGKILL, signal.SIGTERM:
            with self.subTest(number=number.name):
                shutil.rmtree(self.folder / "digits")
                shutil.rmtree(self.folder / "digits-backups")
                output, weights = self.train(number)
                self.assertIn(f"signal {int(number)} to ", output)
                self.assertLen(re.findall("Started training worker group", output), 2)
                self.assertEqual(weights, uncut)


if __name__ == "__main__":
    absltest.main()
