r"""Trains a swarm under the launcher while its workers are killed at random moments.

```bash
python -m tests.chaos --faults=20 --seed=1
```

Three workers train on digits, with backups. At moments drawn from the seed, after a few
local steps or while the workers start, one of them gets SIGKILL, SIGSTOP or SIGTERM.
In the end the weights must be those of an undisturbed training, bit for bit, and
nothing may be left: no unfinished file, no process. Else the exit code is 1.

```bash
python -m tests.chaos --faults=20 --seed=1 --min_workers=2
```

Here the others go on without the worker that is hit, as `tests.chaos_membership` tells:
none of them starts again or repeats a step, the worker is back within two
synchronisations, and all end with equal weights, as good as undisturbed.
"""

import contextlib
import os
import pathlib
import random
import signal
import tempfile
import time
from typing import NamedTuple

import numpy as np
from absl import app, flags

from tests import chaos_membership, chaos_runs

_WORKERS = 3
_SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
# Longer than any silence of a healthy worker, its start included.
_STALL_TIMEOUT = 25
# Bounds a hang, and measures nothing.
_ATTEMPT_SECONDS = 300


class Fault(NamedTuple):
    """One fault and what became of it.

    Attributes:
        worker: The worker that it hit.
        signal: The name of the signal.
        step: The worker's local steps just before; 0 if it had not trained yet.
    """

    worker: int
    signal: str
    step: int


class Report(NamedTuple):
    """What a chaos test ended with.

    Attributes:
        faults: A list of `Fault`.
        lost: For each attempt but the last how many of its steps the next repeated.
        restarts: How many times the launcher started the workers again.
        problems: What did not hold, strings; none if all did.
    """

    faults: list[Fault]
    lost: list[int]
    restarts: int
    problems: list[str]


def run(num_faults, seed):
    """Trains undisturbed and disturbed, and compares.

    Args:
        num_faults: How many faults.
        seed: Seed of their moments, workers and signals.

    Returns:
        A `Report`.
    """
    with tempfile.TemporaryDirectory() as folder:
        calm, stormy = (pathlib.Path(folder, name) for name in ("calm", "stormy"))
        problems = []
        for path, count in ((calm, 0), (stormy, num_faults)):
            path.mkdir()
            with chaos_runs.launcher(
                path,
                "tests.chaos_training",
                f"--num_workers={_WORKERS}",
                f"--max_restarts={count + 2}",
                f"--stall_timeout={_STALL_TIMEOUT}",
            ) as launcher:
                faults = _disturb(path, launcher, count, random.Random(seed))
                code = launcher.wait(_ATTEMPT_SECONDS)
            text = (path / "log").read_text(errors="replace")
            if code:
                problems.append(f"The launcher's exit code is {code}:\n{text[-4000:]}")
        if not problems:
            problems += _compare(calm, stormy)
        if len(faults) < num_faults:
            problems.append(f"The training ended after {len(faults)} faults.")
        problems += [f"Left behind: {path}" for path in stormy.rglob("*unfinished*")]
        problems += [f"Left running: {pid}" for pid in chaos_runs.workers(folder)]
        restarts = chaos_runs.count_restarts(text)
        return Report(faults, _lost_steps(stormy), restarts, problems)


def _disturb(folder, launcher, num_faults, rng):
    """Hits a worker of each attempt once, and returns the faults."""
    faults = []
    old = set()
    for _ in range(num_faults):
        worker, signum = rng.randrange(_WORKERS), rng.choice(_SIGNALS)
        # Every fourth while the workers start.
        seconds = rng.uniform(0, 10) if rng.random() < 0.25 else None
        steps = rng.randint(1, 30)
        deadline = time.monotonic() + _ATTEMPT_SECONDS
        pids = []
        while len(pids) < _WORKERS:
            if launcher.poll() is not None or time.monotonic() > deadline:
                return faults
            time.sleep(0.02)
            pids = sorted(set(chaos_runs.workers(folder)) - old)
        old |= set(pids)
        before = len(_journal(folder, worker))
        start = time.monotonic()
        while launcher.poll() is None and time.monotonic() < deadline:
            if seconds is not None and time.monotonic() - start > seconds:
                break
            if len(_journal(folder, worker)) - before > steps:
                break
            time.sleep(0.01)
        journal = _journal(folder, worker)[before:]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[worker], signum)
            step = int(journal[-1]) if len(journal) > 1 else 0
            faults.append(Fault(worker, signum.name, step))
    return faults


def _journal(folder, worker):
    path = folder / f"journal-{worker}"
    return path.read_text().split() if path.exists() else []


def _compare(calm, stormy):
    with np.load(calm / "weights-0.npz") as expected:
        for worker in range(_WORKERS):
            with np.load(stormy / f"weights-{worker}.npz") as weights:
                for name in expected:
                    if not np.array_equal(expected[name], weights[name]):
                        yield f"Worker {worker} ends with other weights in {name}."


def _lost_steps(folder):
    """Returns for each attempt that trained how many steps the next one repeated."""
    attempts = []
    for text in _journal(folder, 0):
        if text == "start":
            attempts.append([])
        elif text != "0":  # A batch that is skipped on the way back.
            attempts[-1].append(int(text))
    trained = [steps for steps in attempts if steps]
    # The first number of an attempt is where it resumed; 1 if it did not. A worker that
    # leaves after SIGTERM does not come to note its last step.
    return [
        max(0, before[-1] - (after[0] if after[0] > 1 else 0))
        for before, after in zip(trained, trained[1:])
    ]


def show(report):
    """Prints a table of the faults, and what held."""
    print(f"{'fault':>5} {'worker':>6} {'signal':>8} {'local step':>10}")
    for number, fault in enumerate(report.faults, 1):
        step = fault.step or "start"
        print(f"{number:5} {fault.worker:6} {fault.signal:>8} {step:>10}")
    print(
        f"{len(report.faults)} faults, {report.restarts} restarts, "
        f"{sum(report.lost)} steps repeated ({report.lost})."
    )
    if not report.problems:
        print("The same weights as undisturbed, bit for bit; nothing left behind.")


def main(argv):
    """Runs the test, shows what happened, and returns the exit code."""
    del argv
    start = time.monotonic()
    if _MIN_WORKERS.value is None:
        report = run(_FAULTS.value, _SEED.value)
        show(report)
    else:
        report = chaos_membership.run(_FAULTS.value, _SEED.value, _MIN_WORKERS.value)
        chaos_membership.show(report)
    print(f"{time.monotonic() - start:.0f} seconds.")
    for problem in report.problems:
        print(f"PROBLEM: {problem}")
    return 1 if report.problems else 0


if __name__ == "__main__":
    _FAULTS = flags.DEFINE_integer("faults", 20, "How many faults.", lower_bound=0)
    _SEED = flags.DEFINE_integer("seed", 1, "Seed of moments, workers and signals.")
    _MIN_WORKERS = flags.DEFINE_integer(
        "min_workers", None, "How many workers the swarm needs; all if None."
    )
    app.run(main)
