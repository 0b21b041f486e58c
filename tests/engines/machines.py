"""Machines that are none: names and addresses in a network of their own.

```python
with machines.network(folder) as run:
    run(["ping", "-c1", "node2"], timeout=10)
```

A network namespace of Linux: what listens in there is reached from nowhere else, on
whatever address it listens. It takes root, as Slurm's daemons do.
"""

import contextlib
import itertools
import os
import pathlib
import shutil
import signal
import subprocess

# Addresses for documentation. Slurm resolves no name where all are loopback.
_ADDRESSES = {f"node{i}": f"198.51.100.{i}" for i in (1, 2, 3)}
_SET_UP = """
set -e
ip link set lo up
for address in {addresses}; do ip addr add "$address/32" dev lo; done
hostname node1
mount --bind {folder}/hosts /etc/hosts
exec "$@"
"""
_UNSHARE = ["unshare", "--net", "--mount", "--uts"]
ROOT = pathlib.Path(__file__).resolve().parents[2]


def why_not():
    """Returns why there can be no network here, `None` if there can."""
    missing = [name for name in ("setpriv", "unshare", "ip") if not shutil.which(name)]
    if missing:
        return f"There is no {' and no '.join(missing)} on the PATH."
    if subprocess.run([*_UNSHARE, "true"], capture_output=True, timeout=20).returncode:
        return "This user may make no network namespace. Run it as root."
    return None


@contextlib.contextmanager
def network(folder, command, names=(), **environ):
    """Runs a command as the first process of a network, and ends all in it at last.

    Args:
        folder: Where a few files may be written.
        command: What to run there, a list of words.
        names: Further names of node1, node2 and so on, in turns.
        **environ: Environment variables to add.

    Yields:
        The `subprocess.Popen`, its output at `folder / "output"`.
    """
    folder = pathlib.Path(folder)
    lines = ["127.0.0.1 localhost", *(f"{a} {n}" for n, a in _ADDRESSES.items())]
    addresses = itertools.cycle(_ADDRESSES.values())
    lines += [f"{address} {name}" for name, address in zip(names, addresses)]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    set_up = _SET_UP.format(addresses=" ".join(_ADDRESSES.values()), folder=folder)
    # With --pid --kill-child the kernel ends whatever is left when the first one ends.
    own = ["setpriv", "--pdeathsig=KILL", *_UNSHARE, "--pid", "--fork", "--mount-proc"]
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
