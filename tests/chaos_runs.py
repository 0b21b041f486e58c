"""What both forms of `tests.chaos` share: runs under the launcher."""

import contextlib
import json
import pathlib
import re
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parents[1]


@contextlib.contextmanager
def launcher(folder, module, *flags):
    """Runs `python -m module folder` under the launcher, which writes `folder/log`."""
    command = [sys.executable, "-m", "tf_psops.launch", *flags]
    command += ["--", sys.executable, "-m", module, str(folder)]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, cwd=_ROOT) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def workers(folder):
    """Returns the processes that train in the folder or below: a dict to indices."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):  # It may be about to end.
            arguments = (path / "cmdline").read_text().split("\0")
            is_worker = "--" not in arguments  # As the launcher has.
            if is_worker and any(text.startswith(str(folder)) for text in arguments):
                variables = (path / "environ").read_text().split("\0")
                (text,) = [v for v in variables if v.startswith("TF_CONFIG=")]
                config = json.loads(text.partition("=")[2])
                found[int(path.name)] = config["task"]["index"]
    return found


def count_restarts(log):
    """Returns how many restarts the launcher tells of at its end."""
    match = re.search(r"^\[launch\] restarts: (\d+)", log, re.MULTILINE)
    return int(match[1]) if match else 0
