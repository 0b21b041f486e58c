"""Runs a function on every worker of a real cluster of local processes.

```python
def work(number):
    return tf_psops.SwarmStrategy().worker_index + number

assert clusters.run(work, 2, 10) == [10, 11]
```

Nothing here waits without a limit, so that a deadlock fails a test.
"""

import contextlib
import faulthandler
import inspect
import json
import multiprocessing
import os
import pathlib
import pickle
import signal
import socket
import tempfile
import threading
import time
import traceback
from multiprocessing import connection

_TAIL_CHARACTERS = 4000


def run(function, num_workers, *args, timeout=90, only=None):
    """Calls `function(*args)` on every worker and returns what each returned.

    Args:
        function: A function that a new process can import.
        num_workers: Workers in the cluster.
        *args: Its arguments.
        timeout: Seconds for all of it, start-up included.
        only: Indices of the workers to start; the others stay away. Defaults to all.

    Returns:
        A list with the result of each started worker.

    Raises:
        RuntimeError: If a worker raised or died; the text has its traceback.
        TimeoutError: If a worker has not returned in time.
    """
    with start(function, num_workers, *args, only=only) as cluster:
        return cluster.results(timeout)


@contextlib.contextmanager
def start(function, num_workers, *args, only=None):
    """Starts the workers for `run`, and yields a `_Cluster` to watch them."""
    indices = range(num_workers) if only is None else only
    with tempfile.TemporaryDirectory() as folder:
        addresses = _free_addresses(num_workers)
        workers = [
            _Worker(index, addresses, (function, args), pathlib.Path(folder))
            for index in indices
        ]
        try:
            yield _Cluster(workers)
        finally:
            for worker in workers:
                worker.kill()


def ops_of(train_function):
    """Returns the types of all ops that a Keras train function has traced."""
    variables = inspect.getclosurevars(train_function).nonlocals
    traced = variables["multi_step_on_iterator"]._list_all_concrete_functions()
    assert traced
    graphs = [function.graph.as_graph_def() for function in traced]
    ops = {node.op for graph in graphs for node in graph.node}
    for graph in graphs:
        for function in graph.library.function:
            ops.update(node.op for node in function.node_def)
    return ops


class _Cluster:
    """Watches the processes of a cluster.

    Attributes:
        pids: The process id of each worker.
    """

    def __init__(self, workers):
        self._workers = workers
        self.pids = [worker.process.pid for worker in workers]

    def results(self, timeout, only=None):
        """Returns what the workers returned, or some of them; see `run`."""
        deadline = time.monotonic() + timeout
        workers = [w for w in self._workers if only is None or w.index in only]
        pending = {worker.pipe: worker for worker in workers}
        while pending:
            ready = connection.wait(list(pending), deadline - time.monotonic())
            if not ready:
                late = list(pending.values())
                raise TimeoutError(
                    f"After {timeout} s workers {[worker.index for worker in late]} "
                    "had not returned."
                    + "".join(worker.abort_and_explain() for worker in late)
                )
            for pipe in ready:
                pending.pop(pipe).receive()
        return [worker.result for worker in workers]


class _Worker:
    def __init__(self, index, addresses, call, folder):
        self.index = index
        self.result = None
        self._log = folder / f"worker{index}.log"
        task = {"type": "worker", "index": index}
        tf_config = json.dumps({"cluster": {"worker": addresses}, "task": task})
        spawn = multiprocessing.get_context("spawn")
        self.pipe, far_end = spawn.Pipe(duplex=False)
        self.process = spawn.Process(
            target=_work,
            # Pickled once more: TF_CONFIG is set before the function is imported.
            args=(far_end, tf_config, str(self._log), pickle.dumps(call)),
        )
        self.process.start()
        far_end.close()

    def receive(self):
        try:
            error, self.result = self.pipe.recv()
        except EOFError:
            self.process.join(10)
            error = f"died with exit code {self.process.exitcode}"
        if error:
            raise RuntimeError(f"Worker {self.index}: {error}{self._tail()}")

    def abort_and_explain(self):
        """Makes a late worker say where it is."""
        for signum in (signal.SIGCONT, signal.SIGABRT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signum)
        self.process.join(5)
        return self._tail()

    def kill(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _tail(self):
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return f"\n--- output of worker {self.index}:\n{text[-_TAIL_CHARACTERS:]}"


def _work(pipe, tf_config, log, call):
    """Is what a worker's process does."""
    os.environ["TF_CONFIG"] = tf_config
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    faulthandler.enable()
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        function, args = pickle.loads(call)
        answer = None, function(*args)
    except BaseException:
        answer = traceback.format_exc(), None
    pipe.send(answer)
    pipe.close()
    # TensorFlow's servers leave in an orderly way only if all of them do.
    os._exit(0)


def _die_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _free_addresses(count):
    with contextlib.ExitStack() as stack:
        # All stay open until the last is bound, so that no port comes twice.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{free.getsockname()[1]}" for free in sockets]
