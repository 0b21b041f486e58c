"""Work that training need not wait for."""

import threading
from concurrent import futures


def run(function, in_background):
    """Runs a function, at once or while the caller goes on.

    Args:
        function: A function without arguments.
        in_background: Whether the caller goes on meanwhile.

    Returns:
        A `concurrent.futures.Future` of what it returns.
    """
    future = futures.Future()

    def work():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    if in_background:
        # A daemon: a process may end although another worker never comes.
        threading.Thread(target=work, daemon=True).start()
    else:
        future.set_result(function())
    return future
