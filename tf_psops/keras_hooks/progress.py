"""What the progress bar of `fit` shows of the swarm, beside Keras' metrics."""

import keras


class Progress:
    """Shows the swarm in the progress bar of a `fit`, and nowhere else.

    Keras hands one dict of logs to all callbacks: what stood in there would turn up in
    `History`, CSV files and TensorBoard, too. So the bar alone is given more.

    Args:
        callback_list: The `keras.callbacks.CallbackList` of the `fit`.
    """

    def __init__(self, callback_list):
        self._shown = {}
        self._first_end = None
        self._spent = 0.0
        for callback in callback_list.callbacks:
            if isinstance(callback, keras.callbacks.ProgbarLogger):
                for name in ("on_train_batch_end", "on_epoch_end"):
                    method = getattr(type(callback), name).__get__(callback)
                    setattr(callback, name, self._show_also(callback, method))

    def _show_also(self, callback, method):
        def show(index, logs=None):
            method(index, {**(logs or {}), **self._shown})
            # Keras 3.10 would show means over the steps of the epoch.
            if callback.progbar and callback.progbar.stateful_metrics is not None:
                callback.progbar.stateful_metrics.update(self._shown)

        return show

    def note(self, record):
        """Shows from now on what the last record of `PSOSync.log` says."""
        shown = {"syncs": record["sync"] + 1, "num_workers": len(record["members"])}
        measures = record["measures"]
        if measures.get("way") and measures.get("spread") is not None:
            shown["diversity"] = measures["spread"] / measures["way"]
        if self._first_end is None:  # What is before was made by compilers, too.
            self._first_end = record["seconds"]
        else:
            self._spent += record["waiting_seconds"] + record["working_seconds"]
            elapsed = record["seconds"] - self._first_end
            shown["sync_share"] = self._spent / max(elapsed, self._spent, 1e-9)
        self._shown = shown
