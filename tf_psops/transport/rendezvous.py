"""How the workers of a cluster find each other: one listens, another calls.

Every worker listens at its own address of `TF_CONFIG`, and there alone. Of two workers
that start, the one behind calls the one before. Whoever finds that the others run
already calls all of them, to join.

Callers are served side by side, each for a few seconds at most, so that a stranger
holds nobody up.
"""

import contextlib
import errno
import secrets
import socket
import ssl
import threading
import time
from collections import deque

from absl import logging

from tf_psops.transport import handshake
from tf_psops.transport.link import Link

_HANDSHAKE_SECONDS = 5
_AGAIN_SECONDS = 0.1
_PATIENCE_SECONDS = 2  # Before a worker asks those that should call it.
_MOST_CALLERS = 128
# What a worker is doing, as it tells others.
_STARTING, _JOINING, _RUNNING, _FULL = "starting", "joining", "running", "full"


class Rendezvous:
    """Finds the other workers, at the start and when they come back.

    Args:
        index: The place of this worker.
        addresses: The "host:port" of every worker.
        identity: What must be the same on all workers besides: a dict of what JSON
            knows, by names to use in errors.
        secret: The swarm's secret, bytes.
        tls: A `tls.TLS`, or `None`.
        admits: Whether workers may join a swarm that runs.
        returned: A function that is told of a worker that calls a swarm that runs.

    Raises:
        OSError: If this worker cannot listen at its address.
    """

    def __init__(self, index, addresses, identity, secret, tls, admits, returned):
        self._index = index
        self._addresses = tuple(addresses)
        self._identity = {"addresses in TF_CONFIG": list(addresses), **identity}
        self._secret = secret
        self._admits = admits
        self._returned = returned
        # Tells a worker that has started again from what it was before.
        self._incarnation = secrets.token_hex(8)
        self._contexts = [
            tls and tls.context(purpose)
            for purpose in (ssl.Purpose.CLIENT_AUTH, ssl.Purpose.SERVER_AUTH)
        ]
        self._state = _STARTING
        self._problem = ""
        self._answers = {}
        self._found = {}
        # The last link to each worker, taken or not.
        self._links = {}
        self._changed = threading.Condition()
        self._callers = deque()
        self._over = threading.Event()
        try:
            self._listener = _listen(self._addresses[index])
        except OSError as error:
            text = _cannot_listen(index, self._addresses[index], error)
            self._tell_all(text)
            raise OSError(error.errno, text) from error
        threading.Thread(
            target=_accept, args=(self._listener, self._serve), daemon=True
        ).start()

    def start(self, seconds, is_enough):
        """Waits until this worker has a link to every other one.

        Args:
            seconds: How long to wait at most.
            is_enough: A function of the workers found that tells, after that time,
                whether to go on with them.

        Returns:
            Whether the others run already, so that this worker has to join them.

        Raises:
            ValueError: If workers have different versions or settings.
            TimeoutError: If not all workers came in time.
        """
        others = set(range(len(self._addresses))) - {self._index}
        self._call_all()
        with self._changed:
            self._changed.wait_for(
                lambda: self._problem or self._runs or others <= set(self._found),
                seconds,
            )
            missing = others - set(self._found)
            if self._problem:
                self._over.set()
                raise ValueError(self._problem)
            if self._runs:
                self._over.set()
                return True
            if missing:
                if not is_enough({self._index, *self._found}):
                    self._over.set()
                    raise TimeoutError(self._explain(missing, seconds))
                logging.warning("Workers %s have not started.", sorted(missing))
        self.run()
        return False

    def finds_swarm(self):
        """Returns whether any of the other workers runs without this one."""
        others = set(range(len(self._addresses))) - {self._index}
        with self._changed:
            self._state = _STARTING
            self._answers.clear()
        self._call_all()
        with self._changed:
            self._changed.wait_for(
                lambda: self._runs or others <= set(self._answers), _HANDSHAKE_SECONDS
            )
            self._over.set()
            return self._runs

    def join(self):
        """Begins to call all other workers, to join those that run."""
        with self._changed:
            self._state = _JOINING
        self._call_all()

    def run(self):
        """Notes that this worker is in the swarm."""
        with self._changed:
            self._state = _RUNNING
            self._over.set()

    def waiting(self):
        """Returns the workers that wait to join, a set."""
        with self._changed:
            return {worker for worker, link in self._found.items() if link.is_alive()}

    def take(self, worker):
        """Returns the link to a worker that waits to join, `None` if it has gone."""
        with self._changed:
            return self._found.pop(worker, None)

    def put_back(self, worker, link):
        """Lets a worker wait whose link was taken, unless it has called again."""
        with self._changed:
            self._found.setdefault(worker, link)

    def close(self):
        """Listens no more."""
        self._over.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    @property
    def _runs(self):
        return _RUNNING in self._answers.values()

    # Calling.

    def _call_all(self):
        """Calls the others, each in a thread, until `_over`."""
        self._over.set()
        self._over = threading.Event()
        for worker in range(len(self._addresses)):
            if worker != self._index:
                threading.Thread(
                    target=self._call, args=(worker, self._over), daemon=True
                ).start()

    def _call(self, worker, over):
        if worker > self._index and self._state == _STARTING:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._runs or over.is_set(), _PATIENCE_SECONDS
                )
        while not over.is_set():
            with self._changed:
                if self._problem:
                    return
                link = self._links.get(worker)
            if link and link.is_alive():
                over.wait(_AGAIN_SECONDS)
                continue
            connection, answer = None, {}
            try:
                connection = self._connect(worker)
                answer = handshake.call(connection, self._secret, self._hello())
            except handshake.StrangerError:
                answer = {
                    "problem": f"worker {worker} at {self._addresses[worker]} is of "
                    "another swarm, or has another secret (TF_PSOPS_SECRET) than "
                    f"worker {self._index}"
                }
            except (OSError, ValueError):
                answer = {"state": ""}
            with self._changed:
                if over.is_set() or self._links.get(worker) is not link:
                    answer.pop("accepted", None)
                else:
                    self._answers[worker] = answer.get("state", "")
                    self._problem = self._problem or answer.get("problem", "")
                if answer.get("accepted"):
                    self._links[worker] = Link(worker, connection)
                    self._found[worker] = self._links[worker]
                    connection = None
                self._changed.notify_all()
            if connection:
                connection.close()
            over.wait(_AGAIN_SECONDS)

    def _hello(self, problem=""):
        return {
            "index": self._index,
            "identity": self._identity,
            "incarnation": self._incarnation,
            "state": self._state,
            "problem": problem,
        }

    def _connect(self, worker):
        host, port = _split(self._addresses[worker])
        connection = socket.create_connection((host, port), _HANDSHAKE_SECONDS)
        # A port that nobody listens at can be connected to itself.
        if connection.getsockname() == connection.getpeername():
            connection.close()
            raise ConnectionRefusedError
        _, context = self._contexts
        if context:
            try:
                connection = context.wrap_socket(connection, server_hostname=host)
            except BaseException:
                connection.close()
                raise
        return connection

    def _tell_all(self, problem):
        """Lets the others know why this worker does not start."""
        threads = []
        for worker in range(len(self._addresses)):
            if worker == self._index:
                continue

            def tell(worker=worker):
                with (
                    contextlib.suppress(OSError, ValueError),
                    self._connect(worker) as connection,
                ):
                    handshake.call(connection, self._secret, self._hello(problem))

            threads.append(threading.Thread(target=tell, daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(_HANDSHAKE_SECONDS)

    # Being called.

    def _serve(self, connection):
        """Hears a caller, in a thread of its own."""
        with self._changed:
            self._callers.append(connection)
            if len(self._callers) > _MOST_CALLERS:
                # Whoever has been silent for longest.
                _shut(self._callers.popleft())
        threading.Thread(target=self._hear, args=(connection,), daemon=True).start()

    def _hear(self, connection):
        plain, caller = connection, None
        try:
            connection.settimeout(_HANDSHAKE_SECONDS)
            context, _ = self._contexts
            if context:
                connection = context.wrap_socket(connection, server_side=True)

            def reply(hello):
                nonlocal caller
                answer = self._answer(hello)
                if answer.get("accepted"):
                    caller = hello["index"]
                return answer

            handshake.answer(connection, self._secret, reply)
        except (OSError, ValueError):
            # A stranger, or a worker that has gone; it calls again.
            caller = None
        finally:
            with self._changed, contextlib.suppress(ValueError):
                self._callers.remove(plain)
        if caller is None:
            connection.close()
            return
        with self._changed:
            if self._state == _RUNNING:
                # Before the new link is there to be taken, and taken for the old one.
                self._returned(caller)
            earlier = self._found.pop(caller, None)
            if earlier:
                earlier.close()
            self._links[caller] = self._found[caller] = Link(caller, connection)
            self._changed.notify_all()

    def _answer(self, hello):
        """Returns what this worker answers one that has proved to be of the swarm."""
        worker = hello["index"]
        with self._changed:
            problem = hello["problem"] or self._compare(hello)
            if problem:
                if self._state == _STARTING:
                    self._problem = self._problem or problem
                    self._changed.notify_all()
                return {"problem": problem}
            if self._state == _RUNNING and not self._admits:
                return {"state": _FULL, "accepted": False}
            if self._state == _RUNNING:
                accepted = hello["state"] == _JOINING
            else:
                accepted = worker > self._index and hello["state"] != _RUNNING
            return {"state": self._state, "accepted": accepted}

    def _compare(self, hello):
        """Returns in what the caller differs from this worker, "" if in nothing."""
        if hello["index"] == self._index:
            return (
                f"two workers have the index {self._index} of TF_CONFIG. Give every "
                "process a task index of its own"
            )
        for name, value in self._identity.items():
            other = hello["identity"].get(name)
            if other != value:
                return (
                    f"the workers have different {name}: worker {self._index} has "
                    f"{value!r}, worker {hello['index']} has {other!r}. Give all "
                    "workers the same"
                )
        return ""

    def _explain(self, missing, seconds):
        answers = {
            worker: "it runs with others already"
            if self._answers.get(worker) == _FULL
            else f"nobody answers at {self._addresses[worker]}"
            for worker in sorted(missing)
        }
        return (
            f"Not all workers started within startup_timeout={seconds:g} seconds. "
            f"Missing: {answers}. Start the missing workers, see that their addresses "
            "can be reached from here, or wait longer with `startup_timeout`."
        )


def _accept(listener, serve):
    while True:
        try:
            connection, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EBADF, errno.EINVAL):
                return  # Closed.
            time.sleep(0.05)  # Such as too many open files.
            continue
        serve(connection)


def _listen(address):
    host, port = _split(address)
    deadline = time.monotonic() + 3
    while True:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, _, _, _, place = found[0]
        try:
            return socket.create_server(place, family=family, backlog=_MOST_CALLERS)
        except OSError as error:
            # The worker that this one replaces may take a moment to go.
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise
        time.sleep(_AGAIN_SECONDS)


def _cannot_listen(index, address, error):
    remedy = {
        errno.EADDRINUSE: "Another process listens there: end it, or give this worker "
        "another port in TF_CONFIG, on all workers",
        errno.EADDRNOTAVAIL: "It is no address of this machine: give this worker one "
        "of its own in TF_CONFIG, or its own task index",
    }.get(error.errno, "Give this worker an address of its own in TF_CONFIG")
    cause = error.strerror or error
    return f"worker {index} cannot listen at {address}: {cause}. {remedy}"


def _split(address):
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _shut(connection):
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
