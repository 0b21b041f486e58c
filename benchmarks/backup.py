r"""Measures what backups at their default frequency cost.

```bash
python -m benchmarks.backup --repeats=9
```

A swarm of two particles in this process trains with `PSOSync(10)`, in turns without
and with `backup_dir`. The time is that of all steps after the first few, with all
synchronisations, and with the end of training, which waits for the last backup.
"""

import tempfile
import time

import keras
import tensorflow as tf
from absl import app, flags

import tf_psops
from benchmarks import common_flags, turns
from trainers import models

_MODEL = flags.DEFINE_enum("model", "lenet", models.IMAGE_MODELS, "Network.")
_STEPS = flags.DEFINE_integer("steps", 500, "Steps in each timed run.", lower_bound=1)

_GOAL = 1.05
_PARTICLES = 2
_BATCH_SIZE = 32
_IMAGE_SHAPE = (28, 28, 1)
_WARM_UP_STEPS = 10


class _Timer(keras.callbacks.Callback):
    """Takes the time from the end of the first few steps to the end of training."""

    def on_train_batch_end(self, batch, logs=None):
        if batch + 1 == _WARM_UP_STEPS:
            self._start = time.perf_counter()

    def on_train_end(self, logs=None):
        self.seconds = time.perf_counter() - self._start


def measure(model="lenet", steps=500, repeats=9):
    """Measures the seconds of a training without and with backups.

    Args:
        model: One of `trainers.models.IMAGE_MODELS`. Defaults to "lenet".
        steps: Steps in each timed run. Defaults to 500.
        repeats: Timed runs of each side, alternating. Defaults to 9.

    Returns:
        A dict of "without" and "with" to a list of seconds, one for each repeat.
    """
    strategy = tf_psops.SwarmStrategy.in_process(_PARTICLES)
    total = steps + _WARM_UP_STEPS
    images = tf.random.Generator.from_seed(0).uniform(
        [_PARTICLES * _BATCH_SIZE, *_IMAGE_SHAPE]
    )
    labels = tf.zeros([_PARTICLES * _BATCH_SIZE], tf.int32)
    dataset = tf.data.Dataset.from_tensors((images, labels)).cache().repeat(total)

    def make_side(backup_dir):
        with strategy.scope():
            network = models.build(model, _IMAGE_SHAPE, 10, seed=0)
            network.compile(
                optimizer=keras.optimizers.SGD(0.01, momentum=0.9),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            )
        sync = tf_psops.PSOSync(10, backup_dir=backup_dir)

        def run():
            timer = _Timer()
            network.fit(dataset, verbose=0, callbacks=[sync, timer])
            return timer.seconds

        return run

    with tempfile.TemporaryDirectory() as folder:
        sides = {"without": make_side(None), "with": make_side(folder)}
        return turns.take(sides, repeats)


def main(argv):
    """Prints the ratio of the two sides."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Expected flags only.")
    seconds = measure(_MODEL.value, _STEPS.value, common_flags.REPEATS.value)
    ratio = turns.ratio(seconds["with"], seconds["without"])
    print(f"with / without backups: {ratio}, goal {_GOAL}")


if __name__ == "__main__":
    app.run(main)
