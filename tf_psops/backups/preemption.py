"""Notes SIGTERM, by which a machine tells that it is about to go."""

import signal
import threading

from absl import logging

EXIT_CODE = 128 + signal.SIGTERM


class Preemption:
    """Turns the first SIGTERM into a note; a second one ends the process.

    Attributes:
        is_coming: Whether SIGTERM has come since `watch`.
    """

    def __init__(self):
        self.is_coming = False
        self._handler = None

    def watch(self):
        """Begins to note; in another thread than the main one there is no way to."""
        self.is_coming = False
        if threading.current_thread() is not threading.main_thread():
            logging.log_first_n(
                logging.WARNING,
                "Training runs in thread %r. Python tells only its main thread of "
                "signals: SIGTERM will end the process without a backup of the moment. "
                "Call `fit` in the main thread, or rely on `backup_every`.",
                1,
                threading.current_thread().name,
            )
            return
        # TensorFlow's own handler swallows the signal; Python does not know it.
        handler = signal.signal(signal.SIGTERM, self._note)
        before = getattr(handler, "__self__", None)
        if isinstance(before, Preemption):
            # That of a training that was cut short, whose turn is over.
            handler, before._handler = before._handler, None
        self._handler = handler

    def ignore(self):
        """Gives SIGTERM back to who had it before `watch`."""
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _note(self, signum, frame):
        self.is_coming = True
        signal.signal(signum, signal.SIG_DFL)
