"""Work that training need not wait for."""

import threading


class AsyncWork:
    """Runs a function, at once or while the caller goes on.

    Args:
        function: A function without arguments.
        in_background: Whether the caller goes on meanwhile.
    """

    def __init__(self, function, in_background):
        self._result = self._error = self._thread = None
        if in_background:
            # A daemon: a process may end although another worker never comes.
            self._thread = threading.Thread(
                target=self._run, args=(function,), daemon=True
            )
            self._thread.start()
        else:
            self._result = function()

    def wait(self):
        """Waits until the function has returned or raised."""
        if self._thread:
            self._thread.join()

    def result(self):
        """Returns what the function returned, or raises what it raised."""
        self.wait()
        if self._error:
            raise self._error
        return self._result

    def _run(self, function):
        try:
            self._result = function()
        except BaseException as error:
            self._error = error
