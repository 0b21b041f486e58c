r"""Measures the memory of a swarm's training against that of plain Keras.

```bash
python -m benchmarks.memory --params=25M --workers=2
python -m benchmarks.memory --params=1M --workers=2 --syncs=20,500
```

A network is trained by `fit` in processes of its own for each side, and the most
memory is read that a worker has had in use after some synchronisations (`VmHWM`), with
Python's cycle collector switched off. The sides:

  * keras: plain Keras, as many steps.
  * average: `PSOSync` with `ParameterAverage`; pso: with its default rule; pso_backups:
    the same with a backup at every other synchronisation.

The table has megabytes, and in brackets what is above plain Keras as a multiple of the
weights' bytes.
"""

import contextlib
import gc
import json
import math
import os
import pathlib
import tempfile

from absl import app, flags

from benchmarks import cluster_flags, common_flags, processes

SIDES = ("keras", "average", "pso", "pso_backups")

_NUM_LAYERS = 16
_WIDTH_UNIT = 4  # As in most networks, layers have a whole number of vector registers.
_MIN_PARAMS = _NUM_LAYERS * _WIDTH_UNIT**2
_STEPS_PER_SYNC = 2
_ROWS = 8
_MB = 1e6
# The most above plain Keras, as a multiple of the weights, of 25 million of them.
_GOALS = {"average": 4, "pso": 6, "pso_backups": 8}
_SIZE_OF_GOALS = 25_000_000

_PARAMS = flags.DEFINE_list("params", ["25M"], "Parameters of the network.")
_SYNCS = flags.DEFINE_list("syncs", ["10"], "When to read the peak.")
_SIDES = flags.DEFINE_list("sides", list(SIDES), f"Sides: {', '.join(SIDES)}.")
cluster_flags.expect_numbers(_SYNCS, 1)


cluster_flags.expect_params(_PARAMS, _MIN_PARAMS)
flags.register_validator(
    "sides",
    lambda names: names and set(names) <= set(SIDES),
    message=f"Expected some of {SIDES}, separated by commas.",
)


def measure(params, num_workers, syncs=(10,), sides=SIDES):
    """Measures the peak memory of each side.

    Args:
        params: The number of parameters; what is trained is the nearest that 16 square
            matrices hold whose sides are multiples of 4.
        num_workers: W, the number of workers, at least 2; plain Keras has one.
        syncs: Numbers of synchronisations after which the peak is read. Defaults to 10.
        sides: Some of `SIDES`. Defaults to all.

    Returns:
        A list of dicts, one for each side: "side", "params", "workers",
        "weight_bytes", and "peak_bytes", a dict from each of `syncs` to the largest
        peak of a worker.
    """
    width = _WIDTH_UNIT * round(math.sqrt(params / _MIN_PARAMS))
    records = []
    for side in sides:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            addresses = processes.free_addresses(num_workers)
            if side == "keras":
                addresses = addresses[:1]
            workers = processes.Processes(
                _make_worker,
                [(rank, addresses, width) for rank in range(len(addresses))],
            )
            stack.callback(workers.kill)
            workers.receive()
            peaks = [
                max(peaks) for peaks in zip(*workers.ask(side, tuple(syncs), folder))
            ]
        records.append(
            {
                "side": side,
                "params": params,
                "workers": num_workers,
                "weight_bytes": 4 * _NUM_LAYERS * width**2,
                "peak_bytes": dict(zip(syncs, peaks)),
            }
        )
    return records


def _make_worker(barrier, rank, addresses, width):
    """Is a worker, which returns its peaks of a side that it is asked for."""
    del barrier
    if len(addresses) > 1:
        task = {"type": "worker", "index": rank}
        cluster = {"worker": addresses}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})

    def train(side, syncs, folder):
        # Only here, so that the process that asks has no TensorFlow.
        import keras
        import tensorflow as tf

        import tf_psops

        gc.disable()
        strategy = tf.distribute.get_strategy()
        callbacks = []
        if side != "keras":
            strategy = tf_psops.SwarmStrategy(startup_timeout=processes.SECONDS)
            rule = tf_psops.ParameterAverage() if side == "average" else None
            backups = {"backup_dir": folder, "backup_every": 2}
            callbacks.append(
                tf_psops.PSOSync(
                    _STEPS_PER_SYNC, rule, **(backups if "backups" in side else {})
                )
            )
        peaks = []

        class Watch(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if batch + 1 in [_STEPS_PER_SYNC * number for number in syncs]:
                    peaks.append(_peak())

        with strategy.scope():
            keras.utils.set_random_seed(0)
            model = keras.Sequential(
                [keras.Input([width])]
                + [
                    keras.layers.Dense(width, "tanh", use_bias=False)
                    for _ in range(_NUM_LAYERS)
                ]
            )
            model.compile(keras.optimizers.SGD(1e-3), "mse")
        rows = tf.ones([_ROWS * len(addresses), width])
        model.fit(
            tf.data.Dataset.from_tensors((rows, rows)).repeat(),
            steps_per_epoch=_STEPS_PER_SYNC * max(syncs) + 1,
            callbacks=[*callbacks, Watch()],
            verbose=0,
        )
        return peaks

    return train


def _peak():
    """Returns the most bytes that this process has had in memory so far."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return 1024 * int(value.split()[0])
    raise OSError("/proc/self/status has no VmHWM. This benchmark needs Linux.")


def table(records):
    """Returns the text for the records of one `measure`, with goals."""
    first = records[0]
    syncs = list(first["peak_bytes"])
    lines = [
        f"{first['params']} parameters ({first['weight_bytes'] / _MB:.0f} MB), "
        f"{first['workers']} workers: MB at most (weights above plain Keras)",
        f"{'side':12}" + "".join(f"{f'{number} syncs':>30}" for number in syncs),
    ]
    keras = {r["side"]: r["peak_bytes"] for r in records}.get("keras")
    for record in records:
        line = f"{record['side']:12}"
        for number, peak in record["peak_bytes"].items():
            cell = f"{peak / _MB:.0f}"
            if keras and record["side"] != "keras":
                above = (peak - keras[number]) / record["weight_bytes"]
                goal = _GOALS[record["side"]]
                shown = f", goal {goal}" if first["params"] == _SIZE_OF_GOALS else ""
                cell += f" ({above:.1f}{shown})"
            line += f"{cell:>30}"
        lines.append(line)
    return "\n".join(lines)


def main(argv):
    """Prints a table for each size and number of workers, and writes the records."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Expected flags only.")
    cluster_flags.show(
        table,
        (
            measure(
                common_flags.count(params),
                int(workers),
                [int(number) for number in _SYNCS.value],
                _SIDES.value,
            )
            for params in _PARAMS.value
            for workers in cluster_flags.WORKERS.value
        ),
    )


if __name__ == "__main__":
    app.run(main)
