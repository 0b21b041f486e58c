"""Who of all workers writes the files of Keras' callbacks: the chief alone."""

import keras

_WRITERS = (keras.callbacks.CSVLogger, keras.callbacks.TensorBoard)


class FileWriters:
    """Takes the callbacks that write files out of a `fit`, and puts them back.

    All workers log the same numbers. Two must not write the same file.

    Args:
        callback_list: The `keras.callbacks.CallbackList` of the `fit`.
    """

    def __init__(self, callback_list):
        self._list = callback_list
        self._kept_back = []

    def leave_to(self, is_chief):
        """Lets this worker write as long as it is the chief."""
        if is_chief == (not self._kept_back):
            return
        if is_chief:
            # In the middle of training, after the one that was the chief.
            for callback in self._kept_back:
                if isinstance(callback, keras.callbacks.CSVLogger):
                    callback.append = True
                callback.set_params(self._list.params)
                callback.set_model(self._list.model)
                callback.on_train_begin()
            # Before Keras' own `History`, which has the last word.
            self._list.callbacks[-1:-1] = self._kept_back
            self._kept_back = []
            return
        callbacks = self._list.callbacks
        self._kept_back = [c for c in callbacks if isinstance(c, _WRITERS)]
        self._list.callbacks = [c for c in callbacks if not isinstance(c, _WRITERS)]
        for callback in self._kept_back:
            if callback.model is not None and getattr(callback, "csv_file", None):
                callback.on_train_end()
