"""Runs the tests on the oldest and on the newest supported TensorFlow.

```bash
python -m tests.compatibility
python -m tests.compatibility --only=oldest -- tests/cluster_test.py -k bad
```

Each run has a fresh virtual environment of the Python that runs this module. The oldest
one takes Keras at its lower bound, too. What follows `--` is handed on to pytest.
"""

import argparse
import pathlib
import re
import subprocess
import sys
import tempfile
import venv

_ROOT = pathlib.Path(__file__).resolve().parents[1]


def supported():
    """Returns what pip is to install for each run, as `pyproject.toml` bounds it.

    Returns:
        A dict from "oldest" and "newest" to lists of requirements.
    """
    project = (_ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tensorflow = re.search(r'"tensorflow>=2\.(\d+),<2\.(\d+)"', project)
    keras = re.search(r'"keras>=(\d+\.\d+)', project)
    return {
        "oldest": [f"tensorflow==2.{tensorflow[1]}.*", f"keras=={keras[1]}.*"],
        "newest": [f"tensorflow==2.{int(tensorflow[2]) - 1}.*"],
    }


def run(requirements, pytest_args):
    """Runs the tests in a fresh virtual environment.

    Args:
        requirements: List of requirements, for pip, besides the project's own.
        pytest_args: List of arguments for pytest.

    Returns:
        "passed", or what failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        # An old pip can take hours to find versions that fit.
        venv.create(folder, with_pip=True, symlinks=True, upgrade_deps=True)
        python = str(pathlib.Path(folder, "bin", "python"))
        install = [python, "-m", "pip", "install", "--quiet", "-e", ".[test]"]
        if subprocess.run([*install, *requirements], cwd=_ROOT).returncode:
            return "not installed"
        tests = subprocess.run([python, "-m", "pytest", *pytest_args], cwd=_ROOT)
        return "passed" if tests.returncode == 0 else f"failed ({tests.returncode})"


def main():
    runs = supported()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=runs, help="make this run alone")
    parser.add_argument("pytest_args", nargs="*", help="handed on to pytest")
    args = parser.parse_args()
    results = {
        name: run(requirements, args.pytest_args)
        for name, requirements in runs.items()
        if args.only in (None, name)
    }
    for name, result in results.items():
        print(f"{name:8}{', '.join(runs[name]):40}{result}")
    return any(result != "passed" for result in results.values())


if __name__ == "__main__":
    sys.exit(main())
