"""Processes that take part in a benchmark, and answer the one that started them."""

import contextlib
import multiprocessing
import os
import socket
import threading
import time
import traceback
from multiprocessing import connection

SECONDS = 180


class Processes:
    """The processes of a benchmark, which answer questions all together.

    No wait is longer than `SECONDS`, and no process outlives the one that started it.

    Args:
        make: A function that a new process can import. Each calls it with a barrier
            for all of them and with arguments of its own, and what it returns is
            called with each question.
        arguments: A tuple for each process.

    Attributes:
        pids: The process id of each.
    """

    def __init__(self, make, arguments):
        spawn = multiprocessing.get_context("spawn")
        # The processes find it by a name that is gone with the last reference here.
        self._barrier = spawn.Barrier(len(arguments), timeout=SECONDS)
        self._pipes, self._processes = [], []
        for own in arguments:
            pipe, far_end = spawn.Pipe()
            process = spawn.Process(
                target=_work, args=(far_end, make, self._barrier, own), daemon=True
            )
            process.start()
            self._pipes.append(pipe)
            self._processes.append(process)
            far_end.close()
        self.pids = [process.pid for process in self._processes]

    def ask(self, *question):
        """Asks all processes the same, and returns what they answer."""
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):  # What it said last is read.
                pipe.send(question)
        return self.receive()

    def receive(self):
        """Returns what each process has to say."""
        deadline = time.monotonic() + SECONDS
        answers = {}
        while len(answers) < len(self._pipes):
            pending = [pipe for pipe in self._pipes if pipe not in answers]
            ready = connection.wait(pending, deadline - time.monotonic())
            if not ready:
                raise TimeoutError(f"A worker has not answered for {SECONDS} s.")
            for pipe in ready:
                try:
                    error, answers[pipe] = pipe.recv()
                except (EOFError, ConnectionError):
                    error = "It died."
                if error:
                    raise RuntimeError(
                        f"Worker {self._pipes.index(pipe)} failed.\n{error}"
                    )
        return [answers[pipe] for pipe in self._pipes]

    def kill(self):
        """Ends all processes."""
        for process in self._processes:
            process.kill()
        for process, pipe in zip(self._processes, self._pipes):
            process.join()
            pipe.close()


def free_addresses(count):
    """Returns "host:port" of some places on loopback at which nobody listens."""
    with contextlib.ExitStack() as stack:
        # All stay open until the last is bound, so that no port comes twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return ["{}:{}".format(*free.getsockname()) for free in sockets]


def _work(pipe, make, barrier, own):
    """Is what a process does."""
    threading.Thread(target=_die_with_controller, daemon=True).start()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # Read while TensorFlow loads.
    try:
        answer = make(barrier, *own)
        pipe.send((None, None))
        while True:
            pipe.send((None, answer(*pipe.recv())))
    except BaseException:
        pipe.send((traceback.format_exc(), None))


def _die_with_controller():
    multiprocessing.parent_process().join()
    os._exit(1)
