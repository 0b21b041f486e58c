"""The training that `tests.chaos_membership` disturbs: digits, and a timed journal.

The journal has each start, each time that the worker is ready to join the others, and
each local step.
"""

import pathlib
import sys
import time

import keras
import numpy as np

import tf_psops
from tests.chaos_membership import SYNC_EVERY, TIMEOUT
from tf_psops.transport import group
from trainers import datasets, evaluation, models

_BATCH_SIZE = 16
# So that a synchronisation takes place about twice a second.
_STEP_SECONDS = 0.1


class _Journal(keras.callbacks.Callback):
    """Notes the local steps of this worker after each batch, and what it is told."""

    def __init__(self, folder, index, num_steps):
        super().__init__()
        self._folder = folder
        self._path = folder / f"journal-{index}"
        self._step = 0
        # Slower in the end, as long as there are faults to come.
        self._late_step = 0.8 * num_steps

    def note(self, kind, step=0):
        with self._path.open("a") as file:
            file.write(f"{kind} {time.time():.3f} {step}\n")

    def on_train_batch_end(self, batch, logs=None):
        local = self.model.distribute_strategy.experimental_local_results
        step = int(local(self.model.optimizer.iterations.value)[0])
        if step == self._step:
            return  # A batch that is skipped on the way back.
        self._step = step
        self.note("step", step)
        if not (self._folder / "no-more-faults").exists():
            time.sleep(_STEP_SECONDS * (10 if step > self._late_step else 1))


def train(folder):
    """Trains as a worker of `TF_CONFIG` and leaves its weights in the folder."""
    epochs = int((folder / "epochs").read_text())
    keras.utils.set_random_seed(0)
    strategy = tf_psops.SwarmStrategy(timeout=TIMEOUT)
    data = datasets.load("digits")
    swarm = {"num_particles": 3, "batch_size": _BATCH_SIZE}
    steps_per_epoch = datasets.steps_per_epoch(len(data.train_labels), **swarm)
    num_steps = epochs * steps_per_epoch
    journal = _Journal(folder, strategy.worker_index, num_steps)
    journal.note("start")
    with strategy.scope():
        model = models.build("mlp", data.train_images.shape[1:], data.num_classes, 0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        rate = keras.optimizers.schedules.CosineDecay(2e-3, num_steps)
        model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    join = group.Group.join

    def noted_join(*args):
        journal.note("ready")
        return join(*args)

    group.Group.join = noted_join
    model.fit(
        datasets.train_dataset(data, epochs=epochs, seed=0, **swarm),
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        callbacks=[tf_psops.PSOSync(SYNC_EVERY), journal],
        verbose=0,
    )
    score = evaluation.evaluate_swarm(model, datasets.test_dataset(data, batch_size=64))
    path = folder / f"weights-{strategy.worker_index}.npz"
    np.savez(path, *model.get_weights(), accuracy=score.accuracy)


if __name__ == "__main__":
    train(pathlib.Path(sys.argv[1]))
