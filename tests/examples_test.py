"""Runs each of the examples that are one file, small."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
from absl.testing import absltest, parameterized

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_SECONDS = 500


def _run(command, **environ):
    environ = {**os.environ, "PYTHONPATH": str(_ROOT), **environ}
    result = subprocess.run(
        [sys.executable, *command],
        cwd=_ROOT,
        env={**environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    if result.returncode:
        raise AssertionError(f"{command} failed:\n{result.stdout}\n{result.stderr}")
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(2 * _SECONDS)
class ExamplesTest(parameterized.TestCase):
    def needs(self, module):
        if not importlib.util.find_spec(module):
            self.skipTest(f'There is no {module}. Install the extra "examples".')

    def test_language_model(self):
        self.needs("keras_hub")
        output = _run(["examples/language_model.py", "--steps=40"])
        self.assertIn("120576 parameters, bfloat16", output)
        bits = [float(b) for b in re.findall(r"(\d+\.\d+) (?:in|of)", output)]
        self.assertLen(bits, 2)
        self.assertLess(bits[1], 6)  # 8 bits are a byte that nothing is known of.

    def test_transfer_learning(self):
        output = _run(["examples/transfer_learning.py", "--epochs=1"])
        few, many = map(int, re.findall(r"(\d+) bytes frozen, (\d+)", output)[0])
        self.assertGreater(few, 0)
        self.assertGreater(many, few)

    def test_variational_autoencoder(self):
        output = _run(["examples/variational_autoencoder.py", "--epochs=2"])
        self.assertRegex(output, r"agreed model: .*'loss': [23]\d")

    def test_record_files_are_shared_out(self):
        folder = self.enter_context(tempfile.TemporaryDirectory())
        launch = ["-m", "tf_psops.launch", "--num_workers=2", "--", sys.executable]
        output = _run([*launch, "examples/record_files.py", f"--folder={folder}"])
        self.assertRegex(output, r"accuracy: 0\.9")

    def test_tune_interval(self):
        self.needs("optuna")
        output = _run(["examples/tune_interval.py", "--trials=2", "--epochs=1"])
        self.assertRegex(output, r"best: .*'sync_every': \d+")


if __name__ == "__main__":
    absltest.main()
