"""Makes a Keras model speak for its whole swarm, not for one particle of it.

Between two synchronisations every particle has weights of its own. What is asked of the
model then, by Keras in `fit` or by another callback, is answered with the position that
the swarm agreed on at its last synchronisation.
"""

import functools
import inspect
import os
import pathlib
import shutil

import tensorflow as tf
from absl import logging

from tf_psops import tensorflow_internals
from tf_psops.backups import skipped_batches

_ASKED = ("evaluate", "get_weights", "predict_on_batch", "test_on_batch")
_SAVED = ("save", "save_weights", "export")
_MET = ("evaluate", "get_metrics_result")
_SET = ("set_weights", "load_weights")
_TRAINED = ("fit", "train_on_batch")


def speaker(model):
    """Returns the `Synchronizer` that a model speaks by, or `None`."""
    return vars(model).get("_swarm_synchronizer")


def speak_for_swarm(model, synchronizer, sync_class):
    """Replaces the methods by which a model is evaluated, saved and set.

    They take the position that the swarm agreed on, whatever each particle's own is.
    Files are written by the chief alone, and whole: a path holds the old file or the
    new one at any moment. Weights that are set become what the swarm agreed on. A
    training that comes after one that was cut short goes on from there.

    Args:
        model: A `keras.Model` under a `SwarmStrategy`.
        synchronizer: Its `Synchronizer`.
        sync_class: The class `PSOSync`, without which a `fit` should not be.
    """
    strategy = model.distribute_strategy
    object.__setattr__(model, "_swarm_synchronizer", synchronizer)
    for name in _TRAINED:
        method = getattr(type(model), name).__get__(model)
        method = _from_agreed(method, model, synchronizer, sync_class)
        object.__setattr__(model, name, method)
    for name in (*_ASKED, *_SAVED, *_SET, "predict", "get_metrics_result"):
        if not hasattr(type(model), name):
            continue  # A `keras.Trainer` that is no `keras.Model`.
        method = getattr(type(model), name).__get__(model)
        if name in _SAVED:
            method = _by_chief(method, strategy)
        if name != "get_metrics_result":
            wrap = _then_rest if name in _SET else _as_agreed
            method = wrap(method, synchronizer)
        if name in _MET:
            method = _when_all_are_there(method, synchronizer)
        # Past Keras, which tracks what a model is given.
        object.__setattr__(model, name, method)


def _as_agreed(method, synchronizer):
    @functools.wraps(method)
    def ask(*args, **kwargs):
        with synchronizer.agreed():
            return method(*args, **kwargs)

    return ask


def _from_agreed(method, model, synchronizer, sync_class):
    """Begins a training where the model says it is, if the last was cut short.

    Nothing tells of the end of a `fit` that an exception leaves.
    """

    @functools.wraps(method)
    def train(*args, **kwargs):
        if not tensorflow_internals.is_fitting(model):
            synchronizer.come_to_rest()
            tensorflow_internals.begin_at_epoch(model, None)
            skips = model.train_function
            if isinstance(skips, skipped_batches.SkippedBatches):
                model.train_function = skips.train_function
            given = inspect.signature(method).bind_partial(*args, **kwargs).arguments
            callbacks = getattr(given.get("callbacks"), "callbacks", None)
            callbacks = callbacks or tf.nest.flatten(given.get("callbacks"))
            if not any(isinstance(callback, sync_class) for callback in callbacks):
                logging.warning(
                    "%s of model %r has no PSOSync: its particles train apart, and "
                    "none of them stands for the others.",
                    method.__name__,
                    model.name,
                )
        return method(*args, **kwargs)

    return train


def _when_all_are_there(method, synchronizer):
    """Makes sure that all workers are there before Keras sums metrics over them.

    Else it would wait, at the end of an epoch, for those whose data set is longer.
    """

    @functools.wraps(method)
    def wait_first(*args, **kwargs):
        if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
            synchronizer.barrier()
        return method(*args, **kwargs)

    return wait_first


def _then_rest(method, synchronizer):
    @functools.wraps(method)
    def set_all(*args, **kwargs):
        result = method(*args, **kwargs)
        synchronizer.rest()
        return result

    return set_all


def _by_chief(save, strategy):
    """Lets the chief write, beside the path, and then move it there."""

    @functools.wraps(save)
    def save_whole(filepath, *args, **kwargs):
        if not strategy.is_chief:
            return
        path = pathlib.Path(filepath)
        overwrite = args[0] if args else kwargs.get("overwrite", True)
        if "://" in str(filepath) or (path.exists() and not overwrite):
            save(filepath, *args, **kwargs)  # Elsewhere; or Keras asks first.
            return
        # One name for all attempts: the next one clears away what a kill has left.
        unfinished = path.parent / f".{path.name}.unfinished"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            save(unfinished / path.name, *args, **kwargs)
            for written in unfinished.iterdir():
                if (path.parent / written.name).is_dir():
                    # A folder cannot be replaced in one step.
                    shutil.rmtree(path.parent / written.name)
                os.replace(written, path.parent / written.name)
        except OSError as error:
            raise OSError(
                error.errno,
                f"Cannot save the model to {str(filepath)!r}: {error.strerror or error}"
                ". Choose a path that can be written to, on a disk that is not full",
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    return save_whole
