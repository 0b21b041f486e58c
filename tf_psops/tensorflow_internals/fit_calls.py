"""The `fit` that is under way: its callbacks, where it begins, and who calls whom.

Keras tells a callback neither of the others nor of the `fit` that runs it, but the
stack does.
"""

import inspect

import keras


def calling_list(callback):
    """Returns the `keras.callbacks.CallbackList` that calls a callback, or `None`.

    A callback is not told of the others of its `fit`. The list that calls it is the
    `self` of a frame of the stack.
    """
    frame = inspect.currentframe()
    while frame := frame.f_back:
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList):
            return caller if callback in caller.callbacks else None
    return None


def is_fitting(model):
    """Tells whether a model's `fit` is under way in this thread."""
    frame = inspect.currentframe()
    while frame := frame.f_back:
        if frame.f_code.co_name == "fit" and frame.f_locals.get("self") is model:
            return True
    return False


def begin_at_epoch(model, epoch):
    """Makes `fit` begin at an epoch, `None` for where its caller says.

    As Keras' own BackupAndRestore does it.
    """
    model._initial_epoch = epoch


def shows_moving_averages(callbacks):
    """Tells whether a SwapEMAWeights has put moving averages in the weights' place."""
    return any(callback._ema_weights_in_model for callback in callbacks)
