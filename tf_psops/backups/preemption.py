"""Notes SIGTERM, by which a machine tells that it is about to go."""

import signal
import threading

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
        if threading.current_thread() is threading.main_thread():
            # TensorFlow's own handler swallows the signal; Python does not know it.
            self._handler = signal.signal(signal.SIGTERM, self._note)

    def ignore(self):
        """Gives SIGTERM back to who had it before `watch`."""
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _note(self, signum, frame):
        self.is_coming = True
        signal.signal(signum, signal.SIG_DFL)
