"""Machines that are none: names and addresses in a network of their own.

```python
with machines.network(folder) as run:
    run(["ping", "-c1", "node2"], timeout=10)
```

A network namespace of Linux: what listens in there is reached from nowhere else, on
whatever address it listens. It takes root, as Slurm's daemons do.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess

# Addresses for documentation. Slurm resolves no name where all are loopback.
_ADDRESSES = {"node1": "198.51.100.1", "node2": "198.51.100.2"}
_SET_UP = """
set -e
ip link set lo up
for address in {addresses}; do ip addr add "$address/32" dev lo; done
hostname node1
mount --bind {folder}/hosts /etc/hosts
exec "$@"
"""
ROOT = pathlib.Path(__file__).resolve().parents[2]


def why_not():
    """Returns why there can be no network here, `None` if there can."""
    missing = [name for name in ("unshare", "ip") if not shutil.which(name)]
    if missing:
        return f"There is no {' and no '.join(missing)} on the PATH."
    command = ["unshare", "--net", "--mount", "--uts", "true"]
    if subprocess.run(command, capture_output=True, timeout=20).returncode:
        return "This user may make no network namespace. Run it as root."
    return None


@contextlib.contextmanager
def network(folder, command, **environ):
    """Runs a command as the first process of a network, and ends all in it at last.

    Args:
        folder: Where a few files may be written.
        command: What to run there, a list of words.
        **environ: Environment variables to add.

    Yields:
        The `subprocess.Popen`, its output at `folder / "output"`.
    """
    folder = pathlib.Path(folder)
    lines = ["127.0.0.1 localhost", *(f"{a} {n}" for n, a in _ADDRESSES.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    set_up = _SET_UP.format(addresses=" ".join(_ADDRESSES.values()), folder=folder)
    # With --pid --kill-child the kernel ends whatever is left when the first one ends.
    own = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc"]
    with open(folder / "output", "w") as output:
        process = subprocess.Popen(
            [*own, "--kill-child", "sh", "-c", set_up, "-", *map(str, command)],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "PYTHONUNBUFFERED": "1",
                **environ,
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
