"""Reads and checks `TF_CONFIG`, the variable that tells a process its cluster.

TensorFlow reports a mistake in `TF_CONFIG` late: as a hang, or as an error deep in
its run time. `read_tf_config` reports it at once and says what to do. This module
does not import TensorFlow.

The format is that of `tf.distribute.cluster_resolver.TFConfigClusterResolver`:
https://www.tensorflow.org/guide/distributed_training#setting_up_the_tf_config_environment_variable
"""

import json
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

# Job names, in the order in which `Cluster.workers` lists them.
_JOBS = ("chief", "worker")
# A host name, an IPv4 address or a bracketed IPv6 address, then a port.
_ADDRESS = re.compile(r"(?:\[[^\]\s]+\]|[^:\s]+):([0-9]{1,5})")

# In which process managers tell how many processes they have started: Slurm, Open MPI,
# MPICH and Intel MPI, MVAPICH, IBM's jsrun and PyTorch's torchrun.
_NUMBERS_OF_PROCESSES = (
    "SLURM_NTASKS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "JSM_NAMESPACE_SIZE",
    "WORLD_SIZE",
)


class Cluster(NamedTuple):
    """Names the workers of a cluster and this process's place among them.

    Attributes:
      workers: `"host:port"` of every worker, the chief first.
      index: Place of this process in `workers`, from 0.
    """

    workers: tuple[str, ...]
    index: int  # type: ignore[assignment]  # A tuple has a method of that name.

    @property
    def is_chief(self) -> bool:
        """Tells whether this process is the first worker, which logs and saves."""
        return self.index == 0


def read_tf_config(environ: Mapping[str, str] = os.environ) -> Cluster | None:
    """Reads the cluster from `TF_CONFIG`.

    ```python
    tf_config = {
        "cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]},
        "task": {"type": "worker", "index": 1},
    }
    cluster = read_tf_config({"TF_CONFIG": json.dumps(tf_config)})
    assert cluster == (("10.0.0.1:2222", "10.0.0.2:2222"), 1)
    assert not cluster.is_chief
    ```

    Args:
      environ: Environment to read from. Defaults to `os.environ`.

    Returns:
      The cluster, or `None` if `TF_CONFIG` is unset or empty (`""` or `"{}"`), that
      is, if this process trains alone.

    Raises:
      ValueError: If `TF_CONFIG` does not describe a cluster of workers in which this
        process has a place.
    """
    if not isinstance(environ, Mapping):
        raise ValueError(
            "`environ` must be a mapping of environment variables. Received: "
            f'{environ!r}. Pass os.environ, or {{"TF_CONFIG": text}}.'
        )
    text = environ.get("TF_CONFIG", "")
    if not isinstance(text, str):
        raise _error("is not text", text, "Write it with `json.dumps`.")
    text = text.strip()
    if not text:
        return None
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise _error(
            f"is not valid JSON: {error.msg} at line {error.lineno}, column "
            f"{error.colno}",
            text,
            'Write it with `json.dumps`; JSON needs double quotes (") and no '
            "trailing comma.",
        ) from error
    config = _expect_object(
        "value", config, 'Expected {"cluster": {...}, "task": {...}}.'
    )
    if not config:
        return None
    jobs = _read_jobs(config.get("cluster"))
    workers = tuple(address for job in _JOBS for address in jobs.get(job, ()))
    return Cluster(workers, _read_index(config.get("task"), jobs))


def read_resolver(resolver: Any) -> Cluster | None:
    """Reads the cluster from a `tf.distribute.cluster_resolver.ClusterResolver`.

    Args:
      resolver: What a cluster manager's resolver says counts as `TF_CONFIG` does.

    Returns:
      The cluster, or `None` if the resolver knows none.

    Raises:
      ValueError: If it does not describe a cluster of workers in which this process has
        a place.
    """
    jobs = resolver.cluster_spec().as_dict()
    if not jobs:
        return None
    task = {"type": resolver.task_type, "index": resolver.task_id}
    return read_tf_config({"TF_CONFIG": json.dumps({"cluster": jobs, "task": task})})


def sign_of_others(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns what says that this process was started together with others.

    Args:
      environ: Environment to read from. Defaults to `os.environ`.

    Returns:
      A variable that a process manager sets, as `"NAME=4"`, or `None`.
    """
    for name in _NUMBERS_OF_PROCESSES:
        value = environ.get(name, "")
        if value.isdecimal() and int(value) > 1:
            return f"{name}={value}"
    return None


def _read_jobs(jobs: Any) -> dict[str, list[str]]:
    """Returns the checked addresses of each job of `TF_CONFIG["cluster"]`."""
    remedy = 'Expected {"worker": ["host:port", ...]}, the same in every process.'
    if not _expect_object('"cluster"', jobs, remedy):
        raise _error('"cluster" names no job', jobs, remedy)
    seen = set()
    for job, addresses in jobs.items():
        if job not in _JOBS:
            raise _error(
                '"cluster" has an unknown job name',
                job,
                'Use only "chief" and "worker": a swarm has no parameter servers '
                "and no evaluators.",
            )
        if not isinstance(addresses, list) or not addresses:
            raise _error(
                f'job "{job}" has no list of addresses',
                addresses,
                'Expected a non-empty list of "host:port" strings.',
            )
        for address in addresses:
            _check_address(job, address)
            if address in seen:
                raise _error(
                    f'job "{job}" repeats an address',
                    address,
                    "Give every process an address of its own.",
                )
            seen.add(address)
    if len(jobs.get("chief", ())) > 1:
        raise _error(
            'job "chief" has more than one address',
            jobs["chief"],
            'Keep one and move the others to "worker".',
        )
    return jobs


def _check_address(job: str, address: Any) -> None:
    match = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
    if not match or not 1 <= int(match[1]) <= 65535:
        raise _error(
            f'job "{job}" has a bad address',
            address,
            'Expected "host:port" with a port from 1 to 65535, such as '
            '"10.0.0.1:2222".',
        )


def _read_index(task: Any, jobs: Mapping[str, list[str]]) -> int:
    """Returns the place of `TF_CONFIG["task"]` among all workers, chief first."""
    _expect_object('"task"', task, 'Expected {"type": "worker", "index": 0}.')
    job = task.get("type")
    if job == "evaluator":
        raise _error(
            'task "type" is that of an evaluator, which takes no part in a swarm',
            job,
            "Let it load the files that the chief saves, without SwarmStrategy.",
        )
    if not isinstance(job, str) or job not in jobs:
        raise _error(
            'task "type" is not a job of the cluster',
            job,
            f"Expected one of {sorted(jobs)}.",
        )
    index = task.get("index")
    last = len(jobs[job]) - 1
    remedy = f'Expected an integer from 0 to {last}, a place in job "{job}".'
    if not re.fullmatch(r"-?[0-9]+", str(index)):
        raise _error('task "index" is not an integer', index, remedy)
    if not 0 <= int(index) <= last:
        raise _error('task "index" is out of range', index, remedy)
    return int(index) + (len(jobs.get("chief", ())) if job == "worker" else 0)


def _expect_object(name: str, value: Any, remedy: str) -> dict[str, Any]:
    if value is None:
        raise _error(f"{name} is missing", value, remedy)
    if not isinstance(value, dict):
        raise _error(f"{name} is not an object", value, remedy)
    return value


def _error(problem: str, received: Any, remedy: str) -> ValueError:
    return ValueError(f"TF_CONFIG: {problem}. Received: {received!r}. {remedy}")
