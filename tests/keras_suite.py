"""Runs Keras' own tests under a swarm, beside no strategy and a `MirroredStrategy`.

```bash
python -m tests.keras_suite
python -m tests.keras_suite --only=callbacks --strategies=none,swarm
```

The installed Keras brings its tests along. Each begins with the same random seed, and
runs in the scope of a strategy of two particles (replicas) in one process. Each `fit`
under a `SwarmStrategy` gets a `PSOSync` that averages after every execution. Prints how
many tests passed, and every one that fails under the swarm and not without a strategy:
with the reason, where that is known and no fault (`tests/keras_suite_reasons.py`), and
else as unexplained. The exit code says whether any is. A reason that no failure needs
is an error as well.
"""

import argparse
import contextlib
import importlib.util
import inspect
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types

from tests import keras_suite_reasons

_GROUPS = {
    "trainers": ["trainers/*_test.py"],
    "callbacks": ["callbacks/*_test.py"],
    "distribution": [
        "distribution/*_test.py",
        "backend/tensorflow/*distribute_test.py",
    ],
    "models": ["models/*_test.py"],
}
_STRATEGIES = ("none", "swarm", "mirrored")
_SECONDS = 1500  # For the tests of one file under one strategy.
_ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(group, strategy):
    """Runs a group of Keras' tests under a strategy.

    Args:
        group: A key of `_GROUPS`.
        strategy: One of `_STRATEGIES`.

    Returns:
        A dict from each test's name to "passed", "skipped", or what it failed with.
    """
    import keras

    folder = pathlib.Path(keras.__file__).parent / "src"
    results = {}
    for pattern in _GROUPS[group]:
        for path in sorted(folder.glob(pattern)):
            results.update(_run_file(path, strategy))
    return results


def _run_file(path, strategy):
    """Runs one file in a process of its own, which a crash or a hang may end."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder, "results.jsonl")
        command = [sys.executable, "-m", "tests.keras_suite", "--strategies", strategy]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [*command, "--file", str(path), "--out", str(out)],
                cwd=_ROOT,
                timeout=_SECONDS,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        lines = out.read_text().splitlines() if out.exists() else []
    results = dict(map(json.loads, lines))
    if not results:
        return {path.stem: "the process ended before any test"}
    return {name: result or "the process ended" for name, result in results.items()}


class _Notes:
    """Notes, as a plugin of pytest, how tests end."""

    def __init__(self, out):
        self._out = out

    def pytest_runtest_logstart(self, nodeid, location):
        self._note(nodeid, "")

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            self._note(report.nodeid, "skipped")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._note(report.nodeid, str(crash.message if crash else "failed")[:300])
        elif report.when == "call":
            self._note(report.nodeid, "passed")

    def _note(self, nodeid, result):
        name = nodeid.partition("keras/src/")[2] or nodeid
        with self._out.open("a") as file:
            file.write(json.dumps([name, result]) + "\n")


def _set_up_each(strategy):
    """Lets each test begin with one seed, in the scope of a strategy if given."""
    import keras
    from keras.src import testing

    set_up = testing.TestCase.setUp

    def set_up_in_scope(self):
        set_up(self)  # Clears Keras.
        keras.utils.set_random_seed(1)
        if strategy is None:
            return
        scope = strategy.scope()
        scope.__enter__()

        def leave():
            # A test that clears Keras' session has left it.
            with contextlib.suppress(IndexError):
                scope.__exit__(None, None, None)

        self.addCleanup(leave)

    testing.TestCase.setUp = set_up_in_scope


def _run_here(path, name, out):
    """Runs one file in this process."""
    import pytest
    import tensorflow as tf

    import tf_psops
    from tf_psops.keras_hooks import swarm_summaries

    if importlib.util.find_spec("jax") is None:
        # Keras' tests of all backends import it.
        sys.modules["jax"] = types.ModuleType("jax")
    devices = ["CPU:0", "CPU:1"]
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * len(devices),
    )
    makes_its_own = path.stem.endswith("distribute_test")
    if makes_its_own and name == "swarm":
        tf.distribute.MirroredStrategy = tf_psops.SwarmStrategy
    strategy = None
    if not makes_its_own and name == "mirrored":
        strategy = tf.distribute.MirroredStrategy(devices)
    if not makes_its_own and name == "swarm":
        strategy = tf_psops.SwarmStrategy(devices)
    if name == "swarm":
        _synchronise()
        # Else the tests of Keras' `TensorBoard` find curves that are not Keras'.
        swarm_summaries.SwarmSummaries.write = lambda self, record: None
    _set_up_each(strategy)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        options = ["-c", os.devnull, "--rootdir", "/", "-p", "no:cacheprovider", "-q"]
        options += ["--timeout", "240", "-k", "not test_session"]
        return pytest.main([*options, str(path)], plugins=[_Notes(out)])


def _synchronise():
    """Gives each `fit` under a swarm a `PSOSync`."""
    from keras.src.backend.tensorflow import trainer

    import tf_psops

    fit = trainer.TensorFlowTrainer.fit
    signature = inspect.signature(fit)

    def fit_in_step(*args, **kwargs):
        bound = signature.bind(*args, **kwargs).arguments
        model = bound["self"]
        strategy = getattr(model, "distribute_strategy", None)
        if isinstance(strategy, tf_psops.SwarmStrategy):
            given = bound.get("callbacks") or []
            given = list(given) if isinstance(given, (list, tuple)) else [given]
            sync = tf_psops.PSOSync(
                getattr(model, "steps_per_execution", 1), tf_psops.ParameterAverage()
            )
            bound["callbacks"] = [*given, sync]
        return fit(**bound)

    trainer.TensorFlowTrainer.fit = fit_in_step


def unexplained(results):
    """Returns the tests that fail only under a swarm, without a reason.

    Args:
        results: A dict from a strategy's name to what `run` returns.
    """
    return {
        name: result
        for name, result in results["swarm"].items()
        if result not in ("passed", "skipped")
        and results["none"].get(name) == "passed"
        and keras_suite_reasons.reason(name) is None
    }


def idle_reasons(results):
    """Returns the reasons, of files that ran, that a test has without need, or none.

    Args:
        results: A dict from a strategy's name to what `run` returns.

    Returns:
        A dict from a pattern to the tests that it names and that need none.
    """
    files = {name.partition("::")[0] for name in results["swarm"]}
    idle = {}
    for pattern in keras_suite_reasons.patterns():
        if pattern.partition("::")[0] not in files:
            continue
        named = keras_suite_reasons.named(pattern, results["swarm"])
        needless = [
            name
            for name in named
            if results["swarm"][name] in ("passed", "skipped")
            or results["none"].get(name) != "passed"
        ]
        if needless or not named:
            idle[pattern] = needless
    return idle


def _print(group, results, faults):
    print(f"\n{group:14}{'passed':>8}{'failed':>8}{'refused':>9}{'skipped':>9}")
    for strategy, found in results.items():
        ends = list(found.values())
        failed = {n for n, r in found.items() if r not in ("passed", "skipped")}
        refused = set()
        if strategy == "swarm":
            refused = {n for n in failed if keras_suite_reasons.reason(n)}
        counts = ends.count("passed"), len(failed - refused), len(refused)
        print(f"  {strategy:12}{counts[0]:8}{counts[1]:8}{counts[2]:9}", end="")
        print(f"{ends.count('skipped'):9}")
    for name, result in results.get("swarm", {}).items():
        reason = keras_suite_reasons.reason(name)
        if result in ("passed", "skipped"):
            continue
        if results.get("none", {}).get(name) not in ("passed", None):
            print(f"  also without a strategy: {name}")
        elif reason:
            print(f"  refused: {name}\n      {reason}")
    for what, found in faults.items():
        for name, why in found.items():
            print(f"  {what}: {name}\n      {why}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=_GROUPS, help="run this group alone")
    parser.add_argument("--strategies", default=",".join(_STRATEGIES))
    parser.add_argument("--file", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    strategies = args.strategies.split(",")
    if args.file:
        return _run_here(args.file, strategies[0], args.out)
    any_fault = False
    for group in [args.only] if args.only else _GROUPS:
        results = {strategy: run(group, strategy) for strategy in strategies}
        faults = {}
        if {"none", "swarm"} <= results.keys():
            faults = {
                "UNEXPLAINED": unexplained(results),
                "IDLE REASON": idle_reasons(results),
            }
        _print(group, results, faults)
        any_fault |= any(faults.values())
    return any_fault


if __name__ == "__main__":
    sys.exit(main())
