"""Waits for the other workers: bounded, and ended when one of them fails.

A collective of TensorFlow waits for all workers, for ever if need be. Its own time-out
is no way out: each timed collective keeps a thread until the time is over, whether it
has ended or not.
"""

import contextlib
import functools
import threading

import keras
import tensorflow as tf

from tf_psops.transport import collectives

_ERRORS = (
    tf.errors.AbortedError,
    tf.errors.CancelledError,
    tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError,
    tf.errors.UnavailableError,
)
_REASON_SECONDS = 2
_REMEDY = (
    "The workers' collectives are at an end: start all workers again, from a backup if "
    "there is one."
)


@contextlib.contextmanager
def meeting(strategy, name):
    """Bounds the wait for the other workers in a `with` block that meets them.

    Another error than TensorFlow's should arise in the block on all workers, if at all:
    nobody is told of it, unless its `is_known_to_all` says `False`.

    Args:
        strategy: A `SwarmStrategy`; after its `timeout` the wait ends on all workers.
        name: What they meet for, to name it in errors.

    Raises:
        TimeoutError: If not all workers came in time.
        RuntimeError: If another worker failed or is gone.
    """
    if strategy.num_workers == 1:
        yield
        return
    over = threading.Event()
    waited = f"waited for timeout={strategy.timeout:g} seconds"

    def give_up():
        over.set()
        strategy.end_collectives(f"Worker {strategy.worker_index} {waited} for {name}.")

    timer = threading.Timer(min(strategy.timeout, threading.TIMEOUT_MAX), give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        lost = isinstance(error, _ERRORS) or (
            strategy.is_cut_off and isinstance(error, (tf.errors.OpError, OSError))
        )
        if not lost:
            own = not isinstance(error, tf.errors.OpError)
            if own and not hasattr(error, "is_known_to_all"):
                known_to_all(error)
            raise
        if over.is_set():
            raise TimeoutError(
                f"Worker {strategy.worker_index} {waited} for all others to come to "
                f"{name}. Expected them in time: see what they do. Give every worker "
                "as many steps, evaluations and calls of `fit`, or wait longer with "
                f"SwarmStrategy(timeout=...). {_REMEDY}"
            ) from error
        if strategy.is_cut_off:
            error = _reason(strategy) or error
        _, _, told = str(error).partition("aborted by: ")
        raise RuntimeError(
            f"Worker {strategy.worker_index} cannot go on at {name}, because another "
            f"worker failed or is gone ({(told or str(error)).splitlines()[0]}). Look "
            f"at the output of that worker. {_REMEDY}"
        ) from error
    finally:
        timer.cancel()


def _reason(strategy):
    """Returns the error that TensorFlow was told of before the wire was cut."""
    try:
        collectives.tell(strategy, [0], timeout=_REASON_SECONDS)
    except tf.errors.AbortedError as error:
        return error
    except tf.errors.OpError:  # A worker that is gone told nobody.
        return None


@functools.cache
def tell_of_failures():
    """Makes `fit` tell the other workers of an exception that ends it on this one.

    Keras tells its callbacks nothing of it, and hands `fit` itself to none of them
    before it runs: the method of the class has to be replaced.
    """
    fit = keras.Model.fit

    @functools.wraps(fit)
    def fit_or_tell(self, *args, **kwargs):
        try:
            return fit(self, *args, **kwargs)
        except BaseException as error:
            strategy = self.distribute_strategy
            alone = getattr(strategy, "num_workers", 1) == 1
            if not alone and not getattr(error, "is_known_to_all", False):
                text = " ".join(f"{type(error).__name__}: {error}".split())
                strategy.end_collectives(
                    f"Worker {strategy.worker_index} left `fit` with {text[:1000]}"
                )
            raise

    keras.Model.fit = fit_or_tell


def known_to_all(error):
    """Returns an exception that all workers raise: nobody need be told of it."""
    error.is_known_to_all = True
    return error
