r"""Measures what it costs a synchronisation to be recorded and shown.

```bash
python -m benchmarks.pictures --millions=1 --repeats=100
```

A swarm of two particles in this process synchronises after every step. Every other
synchronisation, by the toss of a coin, has all pictures: its record in `PSOSync.log`,
the alarms, the progress bar, TensorBoard's events and the line in `swarm.jsonl`. The
others have none. The goal is a ratio of the medians of at most 1.03.
"""

import pathlib
import statistics
import tempfile
import time

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags

import tf_psops
from benchmarks import common_flags
from trainers import run_files

_MILLIONS = flags.DEFINE_integer(
    "millions", 1, "Parameters of the network, in millions.", lower_bound=1
)

_GOAL = 1.03
_WARM_UP = 10
_TENSORS = 10


class _Sync(tf_psops.PSOSync):
    """A `PSOSync` that shows only what it is told to."""

    shows = True

    def _note(self, seconds):
        if self.shows:
            super()._note(seconds)


class _Coin(keras.callbacks.Callback):
    """Tosses for each synchronisation, and notes when it begins."""

    def __init__(self, sync):
        super().__init__()
        self._sync = sync
        self._random = np.random.default_rng(0)
        self.start = 0.0

    def on_train_batch_end(self, batch, logs=None):
        # The first one makes what the pictures need.
        self._sync.shows = batch == 0 or bool(self._random.integers(2))
        self.start = time.perf_counter()


class _Timer(keras.callbacks.Callback):
    """Notes how long each synchronisation took, with pictures and without."""

    def __init__(self, sync, coin):
        super().__init__()
        self._sync = sync
        self._coin = coin
        self.seconds = {True: [], False: []}

    def on_train_batch_end(self, batch, logs=None):
        if batch >= _WARM_UP:
            taken = time.perf_counter() - self._coin.start
            self.seconds[self._sync.shows].append(taken)


def measure(params, repeats=100):
    """Measures synchronisations with all pictures and with none.

    Args:
        params: The number of parameters, about.
        repeats: Synchronisations of each kind, on average. Defaults to 100.

    Returns:
        A dict of `True`, with pictures, and `False` to a list of seconds.
    """
    size = round((params / _TENSORS) ** 0.5)
    with tf_psops.SwarmStrategy.in_process(2).scope():
        layers = [keras.layers.Dense(size, use_bias=False) for _ in range(_TENSORS)]
        model = keras.Sequential([keras.Input([size]), *layers])
        model.compile(keras.optimizers.SGD(0.0), "mse")
    rows = tf.random.stateless_normal([2, size], [0, 0])
    data = tf.data.Dataset.from_tensors((rows, rows)).repeat(_WARM_UP + 2 * repeats)
    sync = _Sync(1)
    coin = _Coin(sync)
    timer = _Timer(sync, coin)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        log = run_files.SwarmLog(folder / "swarm.jsonl", sync)
        board = keras.callbacks.TensorBoard(folder, write_graph=False)
        callbacks = [coin, sync, log, timer, board]
        model.fit(data, callbacks=callbacks, verbose=2)
    return timer.seconds


def main(argv):
    """Prints medians, quartiles and the ratio."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Expected flags only.")
    seconds = measure(_MILLIONS.value * 10**6, common_flags.REPEATS.value)
    medians = {}
    for shows, name in ((True, "with all pictures"), (False, "with none")):
        low, medians[shows], high = statistics.quantiles(seconds[shows], n=4)
        print(
            f"{name:17} {1e3 * medians[shows]:8.2f} ms "
            f"(quartiles {1e3 * low:.2f} and {1e3 * high:.2f})"
        )
    ratio = medians[True] / medians[False]
    print(f"ratio of the medians {ratio:.3f}, goal {_GOAL}")


if __name__ == "__main__":
    app.run(main)
