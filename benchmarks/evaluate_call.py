r"""Measures what a call of `evaluate` and of `predict` costs, against plain Keras.

```bash
python -m benchmarks.evaluate_call --repeats=9
```

The sides answer for the same small network on the same few rows, in turns in one
process: plain Keras without a strategy, a swarm of one particle, of two, and of four
particles, and TensorFlow's `MirroredStrategy` on two devices. With so few rows what is
measured is what each call sets up.
"""

import functools
import timeit

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from keras import layers

import tf_psops
from benchmarks import common_flags, turns

_BATCHES = flags.DEFINE_integer("batches", 4, "Batches of a call.", lower_bound=1)

_BATCH_SIZE = 8
_GOAL = 2.0  # Of two particles.


def _make_calls(strategy, num_batches):
    """Returns a dict of each call's name to a function that makes it."""
    with strategy.scope():
        model = keras.Sequential([keras.Input([8]), layers.Dense(16), layers.Dense(1)])
        model.compile("sgd", "mse")
    x = np.zeros([num_batches * _BATCH_SIZE, 8], "float32")
    y = np.zeros([num_batches * _BATCH_SIZE, 1], "float32")
    return {
        "evaluate": lambda: model.evaluate(x, y, batch_size=_BATCH_SIZE, verbose=0),
        "predict": lambda: model.predict(x, batch_size=_BATCH_SIZE, verbose=0),
    }


def measure(batches=4, repeats=9):
    """Measures the seconds of a call of each side.

    Args:
        batches: Batches of a call. Defaults to 4.
        repeats: Timed calls of each side, alternating. Defaults to 9.

    Returns:
        A dict of pairs of a call and a side, such as ("predict", "plain"), to a list of
        seconds, one for each repeat.
    """
    # Four devices, of which the other swarms take the first.
    four = tf_psops.SwarmStrategy.in_process(4)
    strategies = {
        "plain": tf.distribute.get_strategy(),
        "one": tf_psops.SwarmStrategy(["CPU:0"]),
        "two": tf_psops.SwarmStrategy(["CPU:0", "CPU:1"]),
        "four": four,
        "mirrored": tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]),
    }
    sides = {
        (name, side): functools.partial(timeit.timeit, call, number=1)
        for side, strategy in strategies.items()
        for name, call in _make_calls(strategy, batches).items()
    }
    return turns.take(sides, repeats, warm_up=2)


def main(argv):
    """Prints the medians and the ratios to plain Keras."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Expected flags only.")
    seconds = measure(_BATCHES.value, common_flags.REPEATS.value)
    for (call, side), values in sorted(seconds.items()):
        ratio = turns.ratio(values, seconds[call, "plain"])
        goal = f", goal {_GOAL}" if side == "two" else ""
        print(f"{call:9}{side:9}{turns.milliseconds(values)}, / plain: {ratio}{goal}")


if __name__ == "__main__":
    app.run(main)
