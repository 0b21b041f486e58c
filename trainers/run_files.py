"""The callbacks by which a run of `trainers.train` writes what happens in it."""

import collections
import math
import time
import weakref

import keras

from trainers import files

_SECONDS_TO_WRITE = 1


class MetricsLog(keras.callbacks.Callback):
    """Writes the metrics of each epoch, over all workers, as one line of JSON.

    Args:
        path: A `pathlib.Path`. A resumed training repeats an epoch, a new one all of
            them: the lines from there on are replaced.
        sync: The `tf_psops.PSOSync` of the training.
    """

    def __init__(self, path, sync):
        super().__init__()
        self._lines = files.JsonLines(path, "epoch")
        self._sync = sync

    def on_epoch_end(self, epoch, logs=None):
        self._lines.append(
            {
                "epoch": epoch,
                **{name: float(value) for name, value in (logs or {}).items()},
                "num_syncs": self._sync.num_syncs,
                "sync_seconds": self._sync.sync_seconds,
            }
        )

    def on_train_end(self, logs=None):
        self._lines.close()


class SwarmLog(keras.callbacks.Callback):
    """Writes each record of `PSOSync.log` as one line of JSON, within a second.

    It must stand behind the `PSOSync` in the list of callbacks. A record has "metrics"
    besides: the means of Keras' metrics over the steps since the last record, of the
    particles of this worker.

    Args:
        path: A `pathlib.Path`. Lines of an earlier run from the first new one on are
            replaced.
        sync: The `tf_psops.PSOSync` of the training.
    """

    def __init__(self, path, sync):
        super().__init__()
        self._lines = files.JsonLines(path, "sync")
        self._sync = sync
        self._waiting = []
        # By itself after a training that has failed.
        weakref.finalize(self, _write_all, self._lines, self._waiting)

    def on_train_begin(self, logs=None):
        self._num_taken = 0
        self._written = 0.0
        self._seen = 0, {}
        self._forget()

    def _forget(self):
        self._steps, self._sums = 0, collections.Counter()

    def on_epoch_begin(self, epoch, logs=None):
        self._noted_steps, self._noted = 0, {}

    def on_train_batch_end(self, batch, logs=None):
        self._seen = batch + 1, logs or {}
        self._take_new()
        # A line at once would take more of a short synchronisation than all else.
        if self._waiting and time.monotonic() - self._written > _SECONDS_TO_WRITE:
            _write_all(self._lines, self._waiting)
            self._written = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        self._count()

    def on_train_end(self, logs=None):
        self._take_new()
        _write_all(self._lines, self._waiting)
        self._lines.close()

    def _take_new(self):
        records = self._sync.log[self._num_taken :]
        if not records:
            return
        self._count()
        means = {n: total / max(self._steps, 1) for n, total in self._sums.items()}
        finite = {n: m if math.isfinite(m) else None for n, m in means.items()}
        self._waiting += [{**record, "metrics": finite} for record in records]
        self._num_taken += len(records)
        self._forget()

    def _count(self):
        """Adds up what is new: Keras tells the means since the epoch began."""
        steps, means = self._seen
        totals = {name: steps * float(mean) for name, mean in means.items()}
        for name, total in totals.items():
            self._sums[name] += total - self._noted.get(name, 0.0)
        self._steps += steps - self._noted_steps
        self._noted_steps, self._noted = steps, totals


def _write_all(lines, waiting):
    for record in waiting:
        lines.append(record)
    waiting.clear()
