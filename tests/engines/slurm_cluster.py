"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd.

```bash
python tests/engines/slurm_cluster.py FOLDER COMMAND...
```

runs a command on it, to be called in a network of `machines`, and ends it.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel")
_SECONDS = 60
# AuthInfo: a job that is put into the queue again waits for its old credential's end.
_CONFIG = """
ClusterName=example
SlurmctldHost=node1(198.51.100.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MailProg=/bin/true
MpiDefault=none
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
KillWait=5
NodeName=node1 NodeHostname=node1 NodeAddr=198.51.100.1 Port=16818 CPUs=2
NodeName=node2 NodeHostname=node1 NodeAddr=198.51.100.2 Port=16819 CPUs=2
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=60 State=UP
"""


@contextlib.contextmanager
def slurm(folder):
    """Starts the daemons, waits until both nodes are idle, and ends them at last."""
    folder = pathlib.Path(folder)
    for name in ("state", "node1", "node2"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "slurm.conf").write_text(_CONFIG.format(folder=folder))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    munged = ["munged", "--foreground", "--force"]
    for option in ("key-file", "socket", "pid-file", "log-file", "seed-file"):
        end = option.removesuffix("-file")
        munged.append(f"--{option}={folder}/munge.{end}")
    daemons = []
    try:
        daemons.append(_start(munged, folder))
        _wait(lambda: (folder / "munge.socket").exists())
        daemons.append(_start(["slurmctld", "-D", "-i"], folder))
        for node in ("node1", "node2"):
            daemons.append(_start(["slurmd", "-D", "-N", node], folder))
        _wait(lambda: _sinfo().split() == ["idle", "idle"])
        yield
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _start(command, folder):
    with open(folder / "daemons.log", "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def _sinfo():
    command = ["sinfo", "--noheader", "--Node", "--format=%T"]
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout


def _wait(condition):
    deadline = time.monotonic() + _SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Slurm is not there after {_SECONDS} s.")
        time.sleep(0.2)


if __name__ == "__main__":
    with slurm(sys.argv[1]):
        code = subprocess.run(sys.argv[2:]).returncode
    sys.exit(code)
