"""The records of a swarm for TensorBoard, beside what Keras writes for it."""

import itertools
import os
import socket
import time

import keras
import tensorflow as tf

_FOLDER = "swarm"
# TensorBoard has a chart for each curve: of more particles a histogram says more.
_MOST_CURVES = 8
_BUCKETS = 16
_SECONDS_TO_FLUSH = 10
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
        if folders:
            summary = _summary(record)
        for folder in folders:
            self._write(folder, summary, record["step"])

    def close(self):
        """Ends the files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _write(self, folder, summary, step):
        if folder not in self._files:
            self._files[folder] = _EventFile(folder)
            self._files[folder].add(_settings_text(self._settings), 0)
        self._files[folder].add(summary, step)


class _EventFile:
    """A file of events for TensorBoard.

    `tf.summary` takes longer to write one than many a synchronisation may.
    """

    def __init__(self, folder):
        tf.io.gfile.makedirs(folder)
        name = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        name = f"events.out.tfevents.{name}.{next(_number_of_file)}.swarm"
        self._writer = tf.io.TFRecordWriter(os.path.join(folder, name))
        self._flushed = 0.0
        self._add(file_version="brain.Event:2")

    def add(self, summary, step):
        """Writes a summary."""
        self._add(summary=summary, step=step)

    def _add(self, **what):
        now = time.time()
        event = tf.compat.v1.Event(wall_time=now, **what)
        self._writer.write(event.SerializeToString())
        if now - self._flushed > _SECONDS_TO_FLUSH:
            self._writer.flush()
            self._flushed = now

    def close(self):
        """Ends the file."""
        self._writer.close()


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
