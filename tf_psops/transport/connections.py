"""Moves vectors between the workers' CPUs over TCP connections of their own.

TensorFlow's collectives copy on their way through gRPC what they move between CPUs,
and take about twice as long for it. Here the bytes go from where a vector lies
straight into the socket, and from the socket to where it will lie.

This module knows bytes and workers. It does not import TensorFlow.
"""

import contextlib
import secrets
import selectors
import socket
import struct
import time

import numpy as np

_SECONDS = 10
_HELLO = struct.Struct("!QI")  # A secret of the swarm, and who is calling.
_SEND, _RECEIVE = selectors.EVENT_WRITE, selectors.EVENT_READ
_ALIGNMENT = 64  # Elements; TensorFlow takes what begins there without a copy.


class Wire:
    """Joins this worker to all others.

    All workers must call the same functions in the same order, with vectors of the
    same size and type. A vector has a share for each worker, of almost equal sizes.
    What comes in goes to memory that the caller gives, who may have some to use again:
    the system clears new memory first.

    Args:
        index: The place of this worker, from 0.
        sockets: A dict from the place of each other worker to a connected socket.
    """

    def __init__(self, index, sockets):
        self._index = index
        self._sockets = sockets
        self.is_cut = False
        for link in sockets.values():
            link.setblocking(False)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A machine that is gone for good says nothing.
            link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def cut(self):
        """Ends all that goes on here, now and later, on this worker and the others."""
        self.is_cut = True
        for link in self._sockets.values():
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    def tell(self, vector):
        """Returns all workers' vectors, one after the other, a flat NumPy array.

        Args:
            vector: A flat NumPy array, not many elements.
        """
        places = range(len(self._sockets) + 1)
        got = {worker: np.empty_like(vector) for worker in self._sockets}
        self._exchange(dict.fromkeys(self._sockets, vector), got)
        return np.concatenate([got.get(worker, vector) for worker in places])

    def scatter(self, vector, memory):
        """Returns all workers' values of this worker's share, a list in their order.

        Args:
            vector: A flat NumPy array.
            memory: An array, [num_workers - 1, share_length(len(vector))], to fill.
        """
        shares = self._shares(len(vector), range(len(self._sockets) + 1))
        mine = vector[shares[self._index]]
        got = {w: row[: len(mine)] for w, row in zip(self._sockets, memory)}
        self._exchange({w: vector[shares[w]] for w in self._sockets}, got)
        return [got.get(worker, mine) for worker in shares]

    def gather(self, share, memory):
        """Returns the vector that all workers' shares make, a NumPy array.

        Args:
            share: A flat NumPy array, this worker's.
            memory: A flat array of the vector's size to fill.
        """
        shares = self._shares(len(memory), range(len(self._sockets) + 1))
        memory[shares[self._index]] = share
        self._spread(memory, shares, self._sockets)
        return memory

    def broadcast(self, vector, root, memory):
        """Returns the vector of the worker `root`, a NumPy array.

        Each of the others gets a share from it, and passes it on: the root's own line
        carries the vector once.

        Args:
            vector: A flat NumPy array.
            root: The place of a worker.
            memory: On other workers than `root` a flat array of the vector's size to
                fill.
        """
        others = [w for w in range(len(self._sockets) + 1) if w != root]
        shares = self._shares(len(vector), others)
        if self._index == root:
            self._exchange({w: vector[shares[w]] for w in others}, {})
            return vector
        self._exchange({}, {root: memory[shares[self._index]]})
        self._spread(memory, shares, [w for w in others if w != self._index])
        return memory

    def share_length(self, size):
        """Returns the elements of the longest share of a vector of `size` elements."""
        return _share_length(size, len(self._sockets) + 1)

    def _spread(self, vector, shares, others):
        """Sends this worker's share to some workers, and fills in theirs."""
        mine = vector[shares[self._index]]
        self._exchange(
            {w: mine for w in others}, {w: vector[shares[w]] for w in others}
        )

    @staticmethod
    def _shares(size, workers):
        """Returns a dict from each worker to the slice that is its share."""
        length = _share_length(size, len(workers))
        return {
            worker: slice(min(place * length, size), min((place + 1) * length, size))
            for place, worker in enumerate(workers)
        }

    def _exchange(self, outgoing, incoming):
        """Sends arrays to workers, and fills arrays with what comes from workers."""
        if self.is_cut:
            raise ConnectionError("The connections between the workers are cut.")
        left = {_SEND: _views(outgoing), _RECEIVE: _views(incoming)}
        try:
            with selectors.DefaultSelector() as selector:
                for worker, link in self._sockets.items():
                    _watch(selector, link, worker, left)
                while selector.get_map():
                    for key, ready in selector.select():
                        for event, views in left.items():
                            if ready & event:
                                _move(event, key.fileobj, views, key.data)
                        _watch(selector, key.fileobj, key.data, left)
        except OSError:
            self.cut()
            raise


def connect(index, hosts, tell):
    """Connects this worker to all others.

    All workers must call it at the same time. They need ports that the system chooses.

    Args:
        index: The place of this worker, from 0.
        hosts: The host name or IP address of each worker, a list.
        tell: A function that takes two numbers of this worker and returns those of all
            workers, a NumPy array [W, 2] of float64.

    Returns:
        A `Wire`, or `None` on all workers if some could not reach each other within
        10 seconds.
    """
    with _listen(hosts[index], len(hosts)) as listener:
        table = tell([listener.getsockname()[1], secrets.randbits(52)])
        addresses = [(host, int(port)) for host, port in zip(hosts, table[:, 0])]
        sockets = {}
        with contextlib.suppress(OSError):  # A time-out is one.
            _meet(index, addresses, int(table[0, 1]), listener, sockets)
    if tell([len(sockets) == len(hosts) - 1, 0])[:, 0].all():
        return Wire(index, sockets)
    for link in sockets.values():
        link.close()
    return None


def _listen(host, backlog):
    try:
        return socket.create_server((host, 0), backlog=backlog)
    except OSError:  # A name by which only the others know this machine.
        return socket.create_server(("", 0), backlog=backlog)


def _meet(index, addresses, secret, listener, sockets):
    """Fills `sockets`: calls the workers before this one, and answers those behind."""
    deadline = time.monotonic() + _SECONDS

    def left():
        return max(deadline - time.monotonic(), 0.001)

    for worker in range(index):
        link = socket.create_connection(addresses[worker], timeout=left())
        link.sendall(_HELLO.pack(secret, index))
        sockets[worker] = link
    while len(sockets) < len(addresses) - 1:
        listener.settimeout(left())
        link, _ = listener.accept()
        worker = _caller(link, secret)
        if worker in range(index + 1, len(addresses)):
            sockets[worker] = link
        else:
            link.close()


def _caller(link, secret):
    """Returns who has called, `None` for somebody who is not of the swarm."""
    link.settimeout(1)
    with contextlib.suppress(OSError, struct.error):
        known, worker = _HELLO.unpack(link.recv(_HELLO.size, socket.MSG_WAITALL))
        return worker if known == secret else None


def _share_length(size, num_shares):
    return -(-size // (num_shares * _ALIGNMENT)) * _ALIGNMENT


def _views(arrays):
    """Returns the bytes of each worker's array that has any."""
    return {
        worker: memoryview(array.view(np.uint8))
        for worker, array in arrays.items()
        if array.size
    }


def _watch(selector, link, worker, left):
    """Watches a worker's socket for what is left to send or receive."""
    wanted = sum(event for event, views in left.items() if worker in views)
    watched = selector.get_map().get(link)
    if watched and wanted != watched.events:
        selector.unregister(link)
        watched = None
    if wanted and not watched:
        selector.register(link, wanted, worker)


def _move(event, link, views, worker):
    """Moves as many of a worker's bytes as its socket takes or has."""
    with contextlib.suppress(BlockingIOError):
        if event == _SEND:
            count = link.send(views[worker])
        else:
            count = link.recv_into(views[worker])
            if not count:
                raise ConnectionError(f"Worker {worker} has closed its connection.")
        views[worker] = views[worker][count:]
        if not views[worker]:
            del views[worker]
