"""One connection to another worker: frames, each with its length and kind.

A link never blocks. What is to be sent waits in its outbox; what comes in is read
frame by frame into memory that the caller chooses, straight from the socket.
"""

import contextlib
import enum
import socket
import ssl
import struct
from collections import deque
from typing import NamedTuple

_HEADER = struct.Struct("!BxxxIQQ")
_BLOCKED = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Kind(enum.IntEnum):
    """What a frame carries: data of a collective, or (from `REPORT` on) control."""

    GATHER = 1
    SCATTER = 2
    SHARE = 3
    BROADCAST = 4
    COMMIT = 5
    REPORT = 10
    VIEW = 11
    JOIN = 12
    LEAVE = 13


class Frame(NamedTuple):
    """What stands before a payload.

    Attributes:
        kind: A `Kind`.
        view: The number of the membership view in which it was sent.
        place: The number of the collective in that view.
        length: Bytes of the payload.
    """

    kind: int
    view: int
    place: int
    length: int


class Link:
    """Joins this worker to another one.

    Args:
        worker: The index of the other worker.
        connection: A connected `socket.socket` or `ssl.SSLSocket`.

    Attributes:
        worker: The index of the other worker.
        is_open: Whether the other one may still say something.
        reason: Why it left, as it said itself; "" if it did not.
        frame: The `Frame` whose payload comes next, `None` before its header came.
    """

    def __init__(self, worker, connection):
        self.worker = worker
        self.is_open = True
        self.reason = ""
        self.frame = None
        self._connection = connection
        self._outbox = deque()
        self._header = bytearray(_HEADER.size)
        self._left = memoryview(self._header)
        self._payload = None
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that is gone for good says nothing.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    @classmethod
    def to_nobody(cls, worker):
        """Returns a link to a worker that cannot be reached: it is at its end."""
        link = cls(worker, socket.socket())
        link.close()
        return link

    def fileno(self):
        """Returns the socket's file descriptor."""
        return self._connection.fileno()

    @property
    def has_to_send(self):
        """Tells whether something waits to be sent."""
        return self.is_open and bool(self._outbox)

    def is_alive(self):
        """Tells whether the other end may still be there, and reads nothing."""
        try:
            # What is encrypted is looked at as it comes in.
            peeked = socket.socket.recv(self._connection, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return self.is_open
        except OSError:
            return False
        return self.is_open and peeked != b""

    def queue(self, frame, payload):
        """Lets a frame wait to be sent.

        Args:
            frame: A `Frame`.
            payload: A `memoryview` of its bytes, which must stay as they are meanwhile.
        """
        self._outbox.append(memoryview(_HEADER.pack(*frame)))
        if len(payload):
            self._outbox.append(payload)

    def extend(self, payload):
        """Lets more of the last frame's payload wait to be sent."""
        self._outbox.append(payload)

    def send(self):
        """Sends as much as the socket takes."""
        try:
            while self._outbox:
                view = self._outbox[0]
                count = self._connection.send(view)
                if count == len(view):
                    self._outbox.popleft()
                else:
                    self._outbox[0] = view[count:]
        except _BLOCKED:
            return
        except OSError:
            self._lose()

    def receive(self, place):
        """Reads what has come.

        Args:
            place: A function of this link, called when the header of a frame has come,
                that returns a `memoryview` to fill with its payload, or `None` to leave
                it in the socket for now.

        Returns:
            A list of the frames that came whole, each with its payload.
        """
        whole = []
        try:
            while self.is_open:
                if self.frame is None:
                    self._fill()
                    self.frame = Frame(*_HEADER.unpack(self._header))
                if self._payload is None:
                    self._payload = place(self)
                    if self._payload is None:
                        break
                    self._left = self._payload
                self._fill()
                whole.append((self.frame, self._payload))
                self.frame = self._payload = None
                self._left = memoryview(self._header)
        except _BLOCKED:
            pass
        except OSError:
            self._lose()
        return whole

    @property
    def is_held(self):
        """Tells whether a frame waits in the socket for its turn."""
        return self.frame is not None and self._payload is None

    def _fill(self):
        while self._left:
            count = self._connection.recv_into(self._left)
            if not count:
                raise ConnectionError
            self._left = self._left[count:]

    def _lose(self):
        self.is_open = False
        self._outbox.clear()

    def hang_up(self):
        """Lets this link's next reader find that it is at an end, in any thread."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self):
        """Ends the connection; what waits to be sent is lost."""
        self._lose()
        self.hang_up()
        self._connection.close()
