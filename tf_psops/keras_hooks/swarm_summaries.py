"""The records of a swarm for TensorBoard, beside what Keras writes for it."""

import itertools
import os
import socket
import time
import weakref

import keras
import tensorflow as tf

_FOLDER = "swarm"
# TensorBoard has a chart for each curve: of more particles a histogram says more.
_MOST_CURVES = 8
_BUCKETS = 16
_SECONDS_TO_WRITE = 10
_number_of_file = itertools.count()
# What a record has besides that is worth a curve, each a number.
_SCALARS = ("bytes", "waiting_seconds", "working_seconds")


class SwarmSummaries:
    """Writes into the `log_dir` of each `keras.callbacks.TensorBoard` of a `fit`.

    It has a run of its own there, "swarm": of several files in one folder TensorBoard
    shows only what is added to the newest. The steps are local steps, as of Keras'
    `batch_` curves, which with `steps_per_execution` count executions.

    Args:
        callback_list: The `keras.callbacks.CallbackList` of the `fit`, which on other
            workers than the chief has no TensorBoard.
        settings: A dict of what the swarm was told, to show as a text.
    """

    def __init__(self, callback_list, settings):
        self._list = callback_list
        self._settings = settings
        self._files = {}

    def write(self, record):
        """Writes one record of `PSOSync.log`."""
        folders = {
            os.path.join(callback.log_dir, _FOLDER)
            for callback in self._list.callbacks
            if isinstance(callback, keras.callbacks.TensorBoard)
        }
        for folder in folders:
            if folder not in self._files:
                self._files[folder] = _EventFile(folder, self._settings)
            self._files[folder].add(record)

    def close(self):
        """Ends the files."""
        for file in self._files.values():
            file.close()
        self._files = {}


class _EventFile:
    """A file of events for TensorBoard, with the settings as a text.

    `tf.summary` takes longer to write one than many a synchronisation may. So does all
    Python that runs only once after much else was in the processor's caches: what is
    written every few seconds at once takes a tenth of the time.
    """

    def __init__(self, folder, settings):
        tf.io.gfile.makedirs(folder)
        name = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        name = f"events.out.tfevents.{name}.{next(_number_of_file)}.swarm"
        self._writer = tf.io.TFRecordWriter(os.path.join(folder, name))
        self._waiting = []
        self._written = 0.0
        _write(self._writer, file_version="brain.Event:2")
        _write(self._writer, summary=_settings_text(settings), step=0)
        # By itself after a training that has failed.
        self.close = weakref.finalize(self, _close, self._writer, self._waiting)

    def add(self, record):
        """Writes a record, in a few seconds or when the file is closed."""
        now = time.time()
        self._waiting.append((now, record))
        if now - self._written > _SECONDS_TO_WRITE:
            _write_all(self._writer, self._waiting)
            self._written = now


def _write(writer, **event):
    event = tf.compat.v1.Event(**{"wall_time": time.time(), **event})
    writer.write(event.SerializeToString())


def _write_all(writer, waiting):
    for now, record in waiting:
        _write(writer, wall_time=now, step=record["step"], summary=_summary(record))
    waiting.clear()
    writer.flush()


def _close(writer, waiting):
    _write_all(writer, waiting)
    writer.close()


def _settings_text(settings):
    rows = [f"| {name} | {value} |" for name, value in settings.items()]
    text = "\n".join(["| Setting | Value |", "| --- | --- |", *rows])
    # Keras needs TensorBoard for its callback; without that one nothing here does.
    from tensorboard.plugins.text import summary_v2

    return _of_tensorboard(summary_v2.text_pb("swarm/settings", text))


def _of_tensorboard(summary):
    """Returns TensorFlow's summary for one of TensorBoard."""
    return tf.compat.v1.Summary.FromString(summary.SerializeToString())


def _summary(record):
    values = {name: record[name] for name in _SCALARS}
    values["workers"] = len(record["members"])
    values["diverged"] = len(record["diverged"])
    values |= record["measures"]
    summary = tf.compat.v1.Summary()
    for name in ("fitness", "distances"):
        numbers = record[name]
        if len(numbers) > _MOST_CURVES:
            summary.MergeFrom(_histogram(f"swarm/{name}", numbers))
            continue
        for particle, number in enumerate(numbers):
            values[f"{name}/particle_{particle}"] = number
    for name, value in values.items():
        if value is not None:
            summary.value.add(tag=f"swarm/{name}", simple_value=value)
    return summary


def _histogram(tag, numbers):
    from tensorboard.plugins.histogram import summary_v2

    known = [number for number in numbers if number is not None]
    return _of_tensorboard(summary_v2.histogram_pb(tag, known, _BUCKETS))
