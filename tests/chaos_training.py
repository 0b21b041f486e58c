"""The training that `tests.chaos` disturbs: digits, with backups, and a journal."""

import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf

import tf_psops
from trainers import datasets, models

EPOCHS = 30
_BATCH_SIZE = 16


class _Journal(keras.callbacks.Callback):
    """Notes each start, and the local steps of this worker after each batch."""

    def __init__(self, path):
        super().__init__()
        self._path = path
        self._note("start")

    def _note(self, text):
        with self._path.open("a") as file:
            file.write(f"{text}\n")

    def on_train_batch_end(self, batch, logs=None):
        local = self.model.distribute_strategy.experimental_local_results
        self._note(int(local(self.model.optimizer.iterations.value)[0]))


def train(folder):
    """Trains as a worker of `TF_CONFIG` and leaves its weights in the folder."""
    keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()
    strategy = tf_psops.SwarmStrategy()
    journal = _Journal(folder / f"journal-{strategy.worker_index}")
    data = datasets.load("digits")
    swarm = {"num_particles": strategy.num_replicas_in_sync, "batch_size": _BATCH_SIZE}
    with strategy.scope():
        model = models.build("mlp", data.train_images.shape[1:], data.num_classes, 0)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(), loss, metrics=["accuracy"])
    sync = tf_psops.PSOSync(5, backup_dir=folder / "backups", backup_every=2)
    model.fit(
        datasets.train_dataset(data, epochs=EPOCHS, seed=0, **swarm),
        epochs=EPOCHS,
        steps_per_epoch=datasets.steps_per_epoch(len(data.train_labels), **swarm),
        callbacks=[sync, journal],
        verbose=0,
    )
    np.savez(folder / f"weights-{strategy.worker_index}.npz", *model.get_weights())


if __name__ == "__main__":
    train(pathlib.Path(sys.argv[1]))
