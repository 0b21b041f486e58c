"""The form of `tests.chaos` in which a swarm goes on without the worker that is hit.

Each fault is SIGKILL or SIGTERM, after which the launcher starts the worker again, or
SIGSTOP, and SIGCONT after longer than the swarm waits. A quarter of the faults hit a
worker again that has not yet come back from the one before.
"""

import collections
import contextlib
import os
import pathlib
import random
import signal
import tempfile
import time
from typing import NamedTuple

import numpy as np

from tests import chaos_runs

SYNC_EVERY = 5
# Longer than a worker that has just joined needs for its first step.
TIMEOUT = 15
_WORKERS = 3
_SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM)
# The others also ask each other who is there.
_STOP_SECONDS = 1.5 * TIMEOUT + 5
_EPOCHS_PER_FAULT = 10
_MAX_ACCURACY_LOSS = 0.01
_MAX_SYNCS = 2
# Bounds a hang, and measures nothing.
_MAX_SECONDS_PER_FAULT = 200


class Fault(NamedTuple):
    """One fault and what became of it.

    Attributes:
        worker: The worker that it hit.
        signal: The name of the signal.
        step: The worker's local steps just before; 0 if it was not yet back.
        time: When it was hit, or after SIGSTOP when it went on.
    """

    worker: int
    signal: str
    step: int
    time: float


class Return(NamedTuple):
    """How a worker came back after a fault.

    Attributes:
        step: Where it begins, as the others count their steps.
        seconds: From the fault, or SIGCONT, to that step.
        syncs: How many synchronisations the others had from when it was ready to join.
        waited: The longest time in seconds from one step of another worker to its next,
            until shortly after.
    """

    step: int
    seconds: float
    syncs: int
    waited: float


class Report(NamedTuple):
    """What the test ended with.

    Attributes:
        faults: A list of `Fault`.
        returns: For each fault a `Return`, or `None` if another one came before.
        restarts: How many times the launcher started a worker again.
        accuracies: Of the undisturbed and of the disturbed training.
        problems: What did not hold, strings; none if all did.
    """

    faults: list[Fault]
    returns: list[Return | None]
    restarts: int
    accuracies: list[float]
    problems: list[str]


class _Note(NamedTuple):
    kind: str
    time: float
    step: int


def run(num_faults, seed, min_workers):
    """Trains undisturbed and disturbed, and compares.

    Args:
        num_faults: How many faults.
        seed: Seed of their moments, workers and signals.
        min_workers: How many workers the swarm needs.

    Returns:
        A `Report`.
    """
    with tempfile.TemporaryDirectory() as folder:
        calm, stormy = (pathlib.Path(folder, name) for name in ("calm", "stormy"))
        problems, faults = [], []
        for path, count in ((calm, 0), (stormy, num_faults)):
            path.mkdir()
            epochs = _EPOCHS_PER_FAULT * max(1, num_faults)
            (path / "epochs").write_text(str(epochs))
            with chaos_runs.launcher(
                path,
                "tests.chaos_membership_training",
                f"--num_workers={_WORKERS}",
                f"--min_workers={min_workers}",
                f"--max_restarts={num_faults}",
            ) as launcher:
                faults = _disturb(path, launcher, count, random.Random(seed))
                (path / "no-more-faults").touch()
                code = launcher.wait(_MAX_SECONDS_PER_FAULT * max(num_faults, 1))
            log = (path / "log").read_text(errors="replace")
            if code:
                problems.append(f"The launcher's exit code is {code}:\n{log[-4000:]}")
        if len(faults) < num_faults:
            problems.append(f"The training ended after {len(faults)} faults.")
        problems += [f"Left running: {pid}" for pid in chaos_runs.workers(folder)]
        journals = [_journal(stormy, worker) for worker in range(_WORKERS)]
        returns = [_return(fault, journals, faults) for fault in faults]
        restarts = chaos_runs.count_restarts(log)
        accuracies = []
        if not problems:
            problems += _check_journals(faults, returns, journals)
            problems += _check_restarts(faults, restarts)
            accuracies = [_accuracy(path, problems) for path in (calm, stormy)]
            if accuracies[1] < accuracies[0] - _MAX_ACCURACY_LOSS:
                problems.append(f"Accuracy: {accuracies[1]}, calm {accuracies[0]}.")
        if problems:
            problems.append(log[-8000:])
        return Report(faults, returns, restarts, accuracies, problems)


def _is_over(launcher, deadline):
    return launcher.poll() is not None or time.monotonic() > deadline


def _disturb(folder, launcher, num_faults, rng):
    """Hits one worker after the other, and returns the faults."""
    faults = []
    hit_pids = set()
    for _ in range(num_faults):
        deadline = time.monotonic() + _MAX_SECONDS_PER_FAULT
        signum = rng.choice(_SIGNALS)
        worker, steps, seconds = rng.randrange(_WORKERS), rng.randint(1, 30), None
        if faults and faults[-1].signal != "SIGSTOP" and rng.random() < 0.25:
            worker, seconds = faults[-1].worker, rng.uniform(0, 10)
        while not (seconds is None and _are_all_in(folder, faults)):
            if _is_over(launcher, deadline):
                return faults
            if seconds is not None and _pid(folder, worker, hit_pids):
                time.sleep(seconds)
                break
            time.sleep(0.02)
        before = len(_journal(folder, worker))
        while seconds is None and len(_journal(folder, worker)) < before + steps:
            if _is_over(launcher, deadline):
                return faults
            time.sleep(0.01)
        pid = _pid(folder, worker, hit_pids)
        journal = _journal(folder, worker)
        is_in = _are_all_in(folder, faults)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
            if signum == signal.SIGSTOP:
                time.sleep(_STOP_SECONDS)
                os.kill(pid, signal.SIGCONT)
            else:
                hit_pids.add(pid)
            step = journal[-1].step if is_in else 0
            faults.append(Fault(worker, signum.name, step, time.time()))
    deadline = time.monotonic() + _MAX_SECONDS_PER_FAULT
    while faults and not _are_all_in(folder, faults):
        if _is_over(launcher, deadline):
            break
        time.sleep(0.02)
    return faults


def _pid(folder, worker, hit_pids):
    """Returns the process of a worker, `None` if it has not started again yet."""
    for pid, index in chaos_runs.workers(folder).items():
        if index == worker and pid not in hit_pids:
            return pid
    return None


def _are_all_in(folder, faults):
    """Tells whether all workers train, and the last one that was hit does again."""
    journals = [_journal(folder, worker) for worker in range(_WORKERS)]
    if not all(journal and journal[-1].kind == "step" for journal in journals):
        return False
    return not faults or _return(faults[-1], journals, faults) is not None


def _journal(folder, worker):
    path = folder / f"journal-{worker}"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    notes = [line.split() for line in lines if line.endswith("\n")]
    return [_Note(kind, float(when), int(step)) for kind, when, step in notes]


def _return(fault, journals, faults):
    """Returns the `Return` after a fault, `None` if another fault came before it."""
    journal = journals[fault.worker]
    later = [f.time for f in faults if f.worker == fault.worker and f.time > fault.time]
    end = min(later, default=float("inf"))
    before = [note.kind for note in journal if note.time <= fault.time]
    after = [note for note in journal if fault.time < note.time < end]
    ready = next((note.time for note in after if note.kind == "ready"), end)
    if fault.signal == "SIGSTOP" and before[-1:] == ["ready"]:
        ready = fault.time
    others = [
        note.step
        for worker, notes in enumerate(journals)
        for note in notes
        if worker != fault.worker and note.time <= ready
    ]
    there = max(others, default=0)
    joined = [n for n in after if n.time > ready and n.step >= max(there, 1)]
    if not joined:
        return None
    first = joined[0]
    syncs = first.step // SYNC_EVERY - there // SYNC_EVERY
    waits = [
        (after.time - before.time)
        for worker, notes in enumerate(journals)
        for before, after in zip(notes, notes[1:])
        if worker != fault.worker and fault.time < after.time < first.time + 10
    ]
    return Return(first.step, first.time - fault.time, syncs, max(waits, default=0))


def _check_journals(faults, returns, journals):
    """Yields what the workers noted and should not have."""
    num_faults = collections.Counter(fault.worker for fault in faults)
    ends = {journal[-1].step for journal in journals}
    if len(ends) > 1:
        yield f"The workers end after different steps: {ends}."
    for worker, journal in enumerate(journals):
        steps = [note.step for note in journal if note.kind == "step"]
        ways = [after - before for before, after in zip(steps, steps[1:])]
        if any(way < 1 for way in ways):
            yield f"Worker {worker} repeats a step."
        if sum(way > 1 for way in ways) > num_faults[worker]:
            yield f"Worker {worker} misses steps without a fault: {ways}."
        starts = sum(note.kind == "start" for note in journal)
        if starts > 1 + num_faults[worker]:
            yield f"Worker {worker} has started {starts} times."
    for number, (fault, back) in enumerate(zip(faults, returns), 1):
        if back is not None and back.syncs > _MAX_SYNCS:
            yield f"Fault {number}: back after {back.syncs} synchronisations."
        hit_again = any(
            f.worker == fault.worker and f.time > fault.time for f in faults
        )
        if back is None and not hit_again:
            yield f"Fault {number}: worker {fault.worker} is never back."


def _check_restarts(faults, restarts):
    expected = sum(fault.signal != "SIGSTOP" for fault in faults)
    if restarts != expected:
        yield f"The launcher tells of {restarts} restarts, not of {expected}."


def _accuracy(folder, problems):
    """Returns the accuracy, the same on all workers as are the weights."""
    with np.load(folder / "weights-0.npz") as expected:
        for worker in range(1, _WORKERS):
            with np.load(folder / f"weights-{worker}.npz") as weights:
                problems += [
                    f"{folder.name}: worker {worker} ends with other weights in {name}."
                    for name in expected
                    if not np.array_equal(expected[name], weights[name])
                ]
        return float(expected["accuracy"])


def show(report):
    """Prints a table of the faults, and what held."""
    heads = "fault", "worker", "signal", "at step", "back at", "after s", "syncs"
    print(("{:>5} {:>6} {:>8}" + " {:>8}" * 5).format(*heads, "wait s"))
    for number, (fault, back) in enumerate(zip(report.faults, report.returns), 1):
        step = fault.step or "start"
        print(f"{number:5} {fault.worker:6} {fault.signal:>8} {step:>8}", end="")
        if back is None:
            print(" hit again before")
        else:
            print(
                f" {back.step:8} {back.seconds:8.1f} {back.syncs:8} {back.waited:8.1f}"
            )
    if len(report.accuracies) == 2:
        calm, stormy = report.accuracies
        print(f"Accuracy: {stormy:.4f}, undisturbed {calm:.4f}.")
    print(f"{len(report.faults)} faults, {report.restarts} restarts.")
    if not report.problems:
        print(
            "No survivor restarted or repeated a step; every worker was back within "
            f"{_MAX_SYNCS} synchronisations; equal weights on all workers."
        )
