"""Tests of the wheel: that all is in it, and that it works away from the sources.

To build it, pip gets setuptools from the network.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_PACKAGES = ("tf_psops", "trainers")


def _run(command, cwd, **environ):
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=250,
    )
    if result.returncode:
        raise AssertionError(f"{command} failed:\n{result.stdout}\n{result.stderr}")
    return result.stdout


class WheelTest(absltest.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        source = folder / "source"
        # What an earlier build has left beside the sources would end up in the wheel.
        source.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(_ROOT / name, source)
        for name in _PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(_ROOT / name, source / name, ignore=ignored)
        pip = ["-m", "pip", "--disable-pip-version-check"]
        build = [*pip, "wheel", "--no-deps", "."]
        _run([*build, f"--wheel-dir={folder}"], source)
        (cls.wheel,) = folder.glob("tf_psops-*.whl")
        cls.site = folder / "site"
        _run([*pip, "install", "--no-deps", f"--target={cls.site}", cls.wheel], folder)
        cls.elsewhere = folder / "elsewhere"
        cls.elsewhere.mkdir()

    def test_has_every_module(self):
        names = zipfile.ZipFile(self.wheel).namelist()
        modules = [
            path.relative_to(_ROOT).as_posix()
            for package in _PACKAGES
            for path in (_ROOT / package).rglob("*.py")
        ]
        self.assertCountEqual([n for n in names if n.endswith(".py")], modules)

    def test_says_that_it_has_type_hints(self):
        self.assertIn("tf_psops/py.typed", zipfile.ZipFile(self.wheel).namelist())

    def test_has_the_template_of_reports(self):
        names = zipfile.ZipFile(self.wheel).namelist()
        self.assertIn("trainers/templates/report.html", names)

    def test_trains_on_two_workers(self):
        train = ["-m", "trainers.train", "--model=mlp", "--epochs=1"]
        output = _run(
            ["-m", "tf_psops.launch", "--", sys.executable, *train],
            self.elsewhere,
            PYTHONPATH=str(self.site),
        )
        self.assertRegex(output, r"\[worker 1\] swarm +0\.")

    def test_is_what_runs_there(self):
        program = "import tf_psops; print(tf_psops.__file__)"
        output = _run(["-c", program], self.elsewhere, PYTHONPATH=str(self.site))
        self.assertStartsWith(output, str(self.site))


if __name__ == "__main__":
    absltest.main()
