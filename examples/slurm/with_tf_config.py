"""Runs a command as a task of Slurm, with the `TF_CONFIG` of its job step.

For programs that know nothing of Slurm:

```bash
srun --nodes=2 --ntasks-per-node=1 python examples/slurm/with_tf_config.py \
    python -m trainers.train --backup_dir=/shared/digits/backups
```

Task r of the step is worker r. The tasks of one node listen at 8888, 8889 and so on.
"""

import json
import os
import re
import subprocess
import sys

_PORT = 8888


def tf_config(environ, hosts, port=_PORT):
    """Returns the `TF_CONFIG` of a task.

    Args:
        environ: Its environment variables.
        hosts: The nodes of its step, in Slurm's order.
        port: That of the first task of each node.
    """
    # "2(x3),1" are two tasks on each of three nodes, and one on a fourth.
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", environ["SLURM_STEP_TASKS_PER_NODE"])
    counts = [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]
    workers = [
        f"{host}:{port + task}"
        for host, tasks in zip(hosts, counts, strict=True)
        for task in range(tasks)
    ]
    task = {"type": "worker", "index": int(environ["SLURM_PROCID"])}
    return json.dumps({"cluster": {"worker": workers}, "task": task})


def main():
    nodes = os.environ["SLURM_STEP_NODELIST"]
    command = ["scontrol", "show", "hostnames", nodes]
    hosts = subprocess.run(command, check=True, capture_output=True, text=True)
    os.environ["TF_CONFIG"] = tf_config(os.environ, hosts.stdout.split())
    # In its own place, so that SIGTERM reaches the command itself.
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
