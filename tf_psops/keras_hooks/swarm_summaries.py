"""The records of a swarm for TensorBoard, beside what Keras writes for it."""

import os

import keras
import tensorflow as tf

_FOLDER = "swarm"
# What a record has besides that is worth a curve, each a number.
_SCALARS = ("bytes", "waiting_seconds", "working_seconds")


class SwarmSummaries:
    """Writes into the `log_dir` of each `keras.callbacks.TensorBoard` of a `fit`.

    It has a run of its own there, "swarm": of several files in one folder TensorBoard
    shows only what is added to the newest. The steps are those of Keras' batches.

    Args:
        callback_list: The `keras.callbacks.CallbackList` of the `fit`, which on other
            workers than the chief has no TensorBoard.
        settings: A dict of what the swarm was told, to show as a text.
    """

    def __init__(self, callback_list, settings):
        self._list = callback_list
        self._settings = settings
        self._writers = {}

    def write(self, record):
        """Writes one record of `PSOSync.log`."""
        folders = {
            os.path.join(callback.log_dir, _FOLDER)
            for callback in self._list.callbacks
            if isinstance(callback, keras.callbacks.TensorBoard)
        }
        for folder in folders:
            # Keras records only some batches.
            with self._writer(folder).as_default(), tf.summary.record_if(True):
                # All at once: a call for each could take longer than to synchronise.
                tf.summary.experimental.write_raw_pb(
                    _summary(record).SerializeToString(), step=record["step"]
                )

    def close(self):
        """Ends the files."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _writer(self, folder):
        if folder not in self._writers:
            writer = self._writers[folder] = tf.summary.create_file_writer(folder)
            rows = [f"| {name} | {value} |" for name, value in self._settings.items()]
            with writer.as_default(), tf.summary.record_if(True):
                text = "\n".join(["| Setting | Value |", "| --- | --- |", *rows])
                tf.summary.text("swarm/settings", text, step=0)
        return self._writers[folder]


def _summary(record):
    values = {name: record[name] for name in _SCALARS}
    values["workers"] = len(record["members"])
    values["diverged"] = len(record["diverged"])
    values |= record["measures"]
    for name in ("fitness", "distances"):
        for particle, value in enumerate(record[name]):
            values[f"{name}/particle_{particle}"] = value
    summary = tf.compat.v1.summary.Summary()
    for name, value in values.items():
        if value is not None:
            summary.value.add(tag=f"swarm/{name}", simple_value=value)
    return summary
