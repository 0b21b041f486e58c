r"""Measures what a swarm adds to the start of a model of many small variables.

```bash
python -m benchmarks.startup --variables=2000 --workers=2 --repeats=3
```

A network is made, compiled, and trained for one step, in processes of their own for
each side, which take turns: plain Keras, and W workers with `PSOSync`. What TensorFlow
takes to be imported is not counted. The table has the CPU seconds and the seconds of
the slowest worker.
"""

import collections
import json
import os
import resource
import statistics
import time

from absl import app, flags

from benchmarks import cluster_flags, common_flags, processes

SIDES = ("keras", "psops")

_WIDTH = 4
_ROWS = 8
_GOAL = 4  # CPU seconds of psops at most, as a multiple of plain Keras'.

_VARIABLES = flags.DEFINE_list("variables", ["2000"], "Variables of the network.")
cluster_flags.expect_numbers(_VARIABLES, 2)


def measure(variables, num_workers, repeats=3):
    """Measures the start of each side.

    Args:
        variables: The number of variables, two for each layer.
        num_workers: W, the number of workers, at least 2; plain Keras has one.
        repeats: Starts of each side, alternating. Defaults to 3.

    Returns:
        A list of dicts, one for each side: "side", "variables", "workers", and the
        medians "cpu_seconds" and "seconds" of the slowest worker.
    """
    starts = collections.defaultdict(list)
    for _ in range(repeats):
        for side in SIDES:
            addresses = processes.free_addresses(num_workers if side == "psops" else 1)
            workers = processes.Processes(
                _make_worker,
                [(rank, addresses, variables // 2) for rank in range(len(addresses))],
            )
            try:
                workers.receive()
                starts[side].append([max(each) for each in zip(*workers.ask(side))])
            finally:
                workers.kill()
    return [
        {
            "side": side,
            "variables": variables,
            "workers": num_workers,
            "cpu_seconds": statistics.median(cpu for cpu, _ in starts[side]),
            "seconds": statistics.median(seconds for _, seconds in starts[side]),
        }
        for side in SIDES
    ]


def _make_worker(barrier, rank, addresses, num_layers):
    """Is a worker, which returns what the start of a side takes: CPU and seconds."""
    if len(addresses) > 1:
        task = {"type": "worker", "index": rank}
        cluster = {"worker": addresses}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    # Only here, so that the process that asks has no TensorFlow.
    import keras
    import tensorflow as tf

    import tf_psops

    def start(side):
        barrier.wait()
        cpu, began = _cpu_seconds(), time.perf_counter()
        strategy, callbacks = tf.distribute.get_strategy(), []
        if side == "psops":
            strategy = tf_psops.SwarmStrategy(startup_timeout=processes.SECONDS)
            callbacks = [tf_psops.PSOSync(10)]
        with strategy.scope():
            entry = keras.Input([_WIDTH])
            # Side by side: Keras goes down a chain of layers by recursion.
            ends = [keras.layers.Dense(_WIDTH)(entry) for _ in range(num_layers)]
            model = keras.Model(entry, keras.layers.Average()(ends))
            model.compile(keras.optimizers.SGD(1e-3), "mse")
        rows = tf.ones([_ROWS * len(addresses), _WIDTH])
        model.fit(rows, rows, len(rows), callbacks=callbacks, verbose=0)
        return _cpu_seconds() - cpu, time.perf_counter() - began

    return start


def _cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def table(records):
    """Returns the text for the records of one `measure`, with the goal."""
    keras, psops = records
    lines = [
        f"{keras['variables']} variables, {keras['workers']} workers: "
        "seconds to the end of the first step",
        f"{'side':8}{'CPU':>10}{'wall':>10}",
    ]
    lines += [
        f"{r['side']:8}{r['cpu_seconds']:10.1f}{r['seconds']:10.1f}" for r in records
    ]
    ratio = psops["cpu_seconds"] / keras["cpu_seconds"]
    return "\n".join([*lines, f"CPU of psops / keras: {ratio:.2f} (goal {_GOAL})"])


def main(argv):
    """Prints a table for each size and number of workers, and writes the records."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Expected flags only.")
    cluster_flags.show(
        table,
        (
            measure(int(variables), int(workers), common_flags.REPEATS.value)
            for variables in _VARIABLES.value
            for workers in cluster_flags.WORKERS.value
        ),
    )


if __name__ == "__main__":
    app.run(main)
