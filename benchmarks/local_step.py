r"""Measures what a local step costs under `SwarmStrategy`, against plain Keras.

```bash
python -m benchmarks.local_step --repeats=9
```

Three sides train the same network on the same synthetic images, alternating in one
process: plain Keras without a strategy, a swarm of one particle, and a swarm of four
particles in this process, each with `PSOSync` but without a synchronisation inside
the time taken. A local step of four particles is compared with four plain steps.
"""

import itertools
import statistics
import time

import keras
import tensorflow as tf
from absl import app, flags

import tf_psops
from benchmarks import common_flags, turns
from trainers import models

_MODEL = flags.DEFINE_enum("model", "lenet", models.IMAGE_MODELS, "Network.")
_STEPS = flags.DEFINE_integer("steps", 100, "Steps in each timed run.", lower_bound=1)

_BATCH_SIZE = 32
_IMAGE_SHAPE = (28, 28, 1)
_WARM_UP_STEPS = 10


class _StepTimer(keras.callbacks.Callback):
    """Takes the median time of the steps after the first few."""

    def __init__(self):
        super().__init__()
        self._ends = []

    def on_train_batch_end(self, batch, logs=None):
        self._ends.append(time.perf_counter())

    @property
    def seconds(self):
        ends = self._ends[_WARM_UP_STEPS - 1 :]
        return statistics.median(b - a for a, b in itertools.pairwise(ends))


def _make_side(strategy, num_particles, model_name, steps):
    """Returns a function that trains for `steps` steps and returns seconds a step."""
    with strategy.scope():
        model = models.build(model_name, _IMAGE_SHAPE, 10, seed=0)
        model.compile(
            optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
    total = steps + _WARM_UP_STEPS
    generator = tf.random.Generator.from_seed(0)
    images = generator.uniform([num_particles * _BATCH_SIZE, *_IMAGE_SHAPE])
    labels = tf.zeros([num_particles * _BATCH_SIZE], tf.int32)
    dataset = tf.data.Dataset.from_tensors((images, labels)).cache().repeat(total)
    callbacks = []
    if isinstance(strategy, tf_psops.SwarmStrategy):
        callbacks.append(tf_psops.PSOSync(total))

    def run():
        timer = _StepTimer()
        model.fit(dataset, verbose=0, callbacks=[timer, *callbacks])
        return timer.seconds

    return run


def measure(model="lenet", steps=100, repeats=9):
    """Measures the seconds of a local step of each side.

    Args:
        model: One of `trainers.models.IMAGE_MODELS`. Defaults to "lenet".
        steps: Steps in each timed run. Defaults to 100.
        repeats: Timed runs of each side, alternating. Defaults to 9.

    Returns:
        A dict of "plain", "one" and "four" to a list of seconds a step, one for each
        repeat.
    """
    swarm = tf_psops.SwarmStrategy.in_process(4)
    sides = {
        "plain": _make_side(tf.distribute.get_strategy(), 1, model, steps),
        "one": _make_side(tf_psops.SwarmStrategy(["CPU:0"]), 1, model, steps),
        "four": _make_side(swarm, 4, model, steps),
    }
    return turns.take(sides, repeats)


def main(argv):
    """Prints the medians and the ratios."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Expected flags only.")
    seconds = measure(_MODEL.value, _STEPS.value, common_flags.REPEATS.value)
    for name, values in seconds.items():
        print(f"{name:6} {turns.milliseconds(values)} a step")
    for name, plain_steps, goal in (("one", 1, 1.05), ("four", 4, 1.3)):
        plain = [plain_steps * value for value in seconds["plain"]]
        ratio = turns.ratio(seconds[name], plain)
        print(f"{name} / {plain_steps} plain: {ratio}, goal {goal}")


if __name__ == "__main__":
    app.run(main)
