"""Who is in the swarm, and what all who are in it do in common.

Members are in a *view*, which has a number. All frames carry the number of their view
and their place in it, so that nothing of an earlier view or another collective is taken
for what is expected.

Where a member is lost, the others agree on the next view. Each reports to the lowest
member that it can reach who else it can reach, and whether it has finished the
transaction at hand. That one decides: the next members are the largest set it finds, in
the order of the workers, of which all reach each other. A view needs `min_workers`
members, and more than half of all workers or exactly half with worker 0 among them: any
two such sets have a member in common, so that a split network never makes two swarms.

A transaction ends with a commit, in which every member tells that it has the result.
Whoever has heard that of all knows that all have it. So if any member has committed,
the others that have the result commit, too, and if none has, all do it again: it
happens on all that are left, or on none.
"""

import functools
import selectors
import struct
import time
from typing import NamedTuple

import numpy as np

from tf_psops import heartbeat
from tf_psops.transport.link import Frame, Kind

_READ, _WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_STATUS = struct.Struct("!QQ?")
_LENGTH = struct.Struct("!Q")
_NOTHING = memoryview(b"")
_BEAT_SECONDS = 1


class LostError(Exception):
    """A member is lost, or says that one is: the view has to change.

    Attributes:
        late: The workers that have not come in time; empty if another cause was first.
    """

    def __init__(self, reason, late=()):
        super().__init__(reason)
        self.late = tuple(late)


class DroppedError(RuntimeError):
    """The others go on without this worker."""


class _Report(NamedTuple):
    view: int
    finished: int  # Transactions that the worker has committed.
    has_result: bool  # Of the one after.
    reached: frozenset


class Membership:
    """Moves bytes between the members of the swarm, and agrees on who they are.

    Args:
        index: The place of this worker.
        num_workers: The number of workers of the cluster.
        min_workers: How many members a view needs.

    Attributes:
        view: The number of the view.
        members: The workers in it, a sorted tuple.
        links: A dict from each other worker to its `Link`.
        timeout: Seconds to wait for other workers.
        finished: How many transactions have been committed.
        invitation: What a member has sent for this worker to join, `None` before.
    """

    def __init__(self, index, num_workers, min_workers):
        self.index = index
        self.num_workers = num_workers
        self.min_workers = min_workers
        self.view = 0
        self.members = (index,)
        self.links = {}
        self.timeout = 1800.0
        self.finished = 0
        self._place = 0
        self._deadline = None
        self.invitation = None
        self._reports = {}
        self._decision = None

    @property
    def others(self):
        """Returns the other members, a tuple."""
        return tuple(worker for worker in self.members if worker != self.index)

    def begin(self, view, members):
        """Begins a view."""
        self.view, self.members = view, tuple(sorted(members))
        self._place = 0
        self._reports = {w: r for w, r in self._reports.items() if r.view >= view}

    # Collectives.

    def exchange(self, kind, outgoing, incoming):
        """Sends arrays to members, and fills arrays with what comes from members.

        All members must call it with the same kind in the same order.

        Args:
            kind: A `Kind`.
            outgoing: A dict from workers to flat NumPy arrays.
            incoming: A dict from workers to flat NumPy arrays to fill.

        Raises:
            LostError: If a member is gone or late.
            ValueError: If another member is at another collective.
        """
        expected = {worker: _bytes(array) for worker, array in incoming.items()}
        for worker, array in outgoing.items():
            payload = _bytes(array)
            frame = Frame(kind, self.view, self._place, len(payload))
            self.links[worker].queue(frame, payload)
        waiting = set(expected)

        def place(link):
            frame = link.frame
            if frame.kind >= Kind.REPORT or frame.view < self.view:
                return memoryview(bytearray(frame.length))
            if (frame.view, frame.place) != (self.view, self._place):
                return None
            target = expected.get(link.worker)
            if frame.kind != kind or target is None or len(target) != frame.length:
                raise ValueError(
                    "The workers of a swarm must come to the same collectives in the "
                    f"same order. Worker {link.worker} is at {_describe(frame)}; "
                    f"worker {self.index} expected "
                    f"{_describe(Frame(kind, 0, 0, len(target or b'')))}. Run the same "
                    "program with the same arguments on all workers."
                )
            return target

        def arrived(worker, frame, payload):
            if frame.kind >= Kind.REPORT:
                self._hear(worker, frame, payload)
            elif frame.view == self.view:
                waiting.discard(worker)

        def is_over():
            if not waiting and not any(self.links[w].has_to_send for w in outgoing):
                return True
            for worker in waiting:
                link = self.links[worker]
                if not link.is_open:
                    raise LostError(
                        link.reason or f"worker {worker} has closed its connection"
                    )
            if self._reports or self._decision:
                raise LostError("another worker has lost one")
            return False

        if not self._pump(is_over, place, arrived):
            late = waiting | {w for w in outgoing if self.links[w].has_to_send}
            raise LostError(f"workers {sorted(late)} have not come", late)
        self._place += 1

    def limit(self):
        """Begins to wait: for `timeout` seconds from now, whatever is waited for."""
        self._deadline = time.monotonic() + self.timeout

    def leave(self, text):
        """Tells the others that this worker leaves, and why."""
        payload = memoryview(text.encode())
        for link in self.links.values():
            if link.is_open:
                link.queue(Frame(Kind.LEAVE, self.view, 0, len(payload)), payload)
        self._deadline = time.monotonic() + 2

        def is_over():
            return not any(link.has_to_send for link in self.links.values())

        self._pump(is_over, lambda link: None, None)

    def admit(self, worker, link):
        """Begins the next view, of which another worker is a member."""
        self.links[worker] = link
        self.begin(self.view + 1, (*self.members, worker))

    def invite(self, worker, state):
        """Sends a newcomer in this view what it needs to join.

        Args:
            worker: The newcomer.
            state: A flat NumPy array of bytes.
        """
        text = _pack(self.members, self.view, self.finished, False)
        link, payload = self.links[worker], memoryview(state)
        length = _LENGTH.size + len(text) + len(payload)
        link.queue(
            Frame(Kind.JOIN, self.view, 0, length),
            memoryview(_LENGTH.pack(len(text)) + text),
        )
        link.extend(payload)
        self.limit()
        self._pump(lambda: not link.has_to_send, lambda link: None, None)

    def await_invitation(self, seconds):
        """Waits until a member lets this worker join, and begins its view.

        Returns:
            What the member sent for it, a `memoryview`, or `None` after some seconds.
        """
        self._deadline = time.monotonic() + seconds
        self._pump(lambda: self.invitation, *self._ears)
        if self.invitation is None:
            return None
        payload, self.invitation = self.invitation, None
        (length,) = _LENGTH.unpack_from(payload)
        start = _LENGTH.size + length
        view, self.finished, _, members = _unpack(payload[_LENGTH.size : start])
        self.begin(view, members)
        return payload[start:]

    # Membership.

    def change_view(self, has_result):
        """Agrees with the others that are left on the next view, and begins it.

        Args:
            has_result: Whether this worker has the result of the transaction at hand.

        Returns:
            Whether that transaction is committed, and not to be done again.

        Raises:
            DroppedError: If this worker is not in the next view.
        """
        grace = min(max(0.2 * self.timeout, 1), 10)
        came_at_the_latest = self._deadline
        leader = None
        while self._decision is None:
            reached = self._reached()
            mine = _Report(self.view, self.finished, has_result, frozenset(reached))
            if min(reached) != leader:
                leader = min(reached)
                # The lowest asks the others, who may not know yet.
                asked = reached - {leader} if leader == self.index else {leader}
                self._report(asked, mine)
                self._deadline = max(came_at_the_latest, time.monotonic()) + grace
                if leader != self.index:
                    self._deadline += grace
            if leader != self.index:
                link = self.links[leader]
                if not self._pump(
                    lambda link=link: self._decision or not link.is_open, *self._ears
                ):
                    link.close()
                continue
            self._reports[self.index] = mine
            complete = functools.partial(self._is_complete, reached)
            if not self._pump(complete, *self._ears):
                for worker in self._awaited(reached):
                    self.links[worker].close()
            elif self._decision is None and self._reached() == reached:
                # Those whom another one misses may be there all the same.
                self._deadline = time.monotonic() + min(grace, 1)
                self._pump(
                    lambda reached=reached: reached <= set(self._reports), *self._ears
                )
                self._decide()
        view, finished, members = self._decision
        self._decision = None
        self._reports.clear()
        for worker, link in self.links.items():
            if worker not in members:
                link.close()
        if self.index not in members:
            raise DroppedError(
                f"Worker {self.index} has been dropped: workers {list(members)} go on."
                if members
                else f"Worker {self.index} cannot go on: fewer than "
                f"min_workers={self.min_workers} reach each other, or not the larger "
                "part of the swarm. Start the others again, or all from a backup."
            )
        committed = finished > self.finished
        self.finished = finished
        self.begin(view, members)
        return committed

    def is_quorum(self, members):
        """Returns whether workers may go on as the swarm."""
        half = self.num_workers / 2
        return len(members) >= self.min_workers and (
            len(members) > half or (len(members) == half and 0 in members)
        )

    @property
    def _ears(self):
        """Returns how to listen while the view changes: to control frames alone."""

        def place(link):
            # What was begun in this view has no use any more; what is newer waits.
            if link.frame.kind < Kind.REPORT and link.frame.view > self.view:
                return None
            return memoryview(bytearray(link.frame.length))

        return place, self._hear

    def _reached(self):
        return {self.index} | {w for w in self.others if self.links[w].is_open}

    def _awaited(self, reached):
        """Returns who has not reported and is missed by none of those who have."""
        missed = {
            worker
            for report in self._reports.values()
            for worker in set(self.members) - report.reached
        }
        return reached - set(self._reports) - missed

    def _is_complete(self, reached):
        return (
            self._decision or not self._awaited(reached) or self._reached() != reached
        )

    def _decide(self):
        """Decides on the next view as the lowest of those who reach each other."""
        reached = self._reached()
        reports = {w: report for w, report in self._reports.items() if w in reached}
        members = []
        for worker in sorted(reports):
            if all(
                worker in reports[other].reached and other in reports[worker].reached
                for other in members
            ):
                members.append(worker)
        finished = max(reports[worker].finished for worker in members)
        members = [
            worker
            for worker in members
            if reports[worker].finished == finished
            or (reports[worker].finished == finished - 1 and reports[worker].has_result)
        ]
        view = max(report.view for report in reports.values()) + 1
        if not self.is_quorum(members):
            members = []
        self._decision = view, finished, tuple(members)
        payload = _pack(members, view, finished, False)
        for worker in set(reports) - {self.index}:
            link = self.links[worker]
            if link.is_open:
                link.queue(Frame(Kind.VIEW, self.view, 0, len(payload)), payload)
        self._deadline = time.monotonic() + 5
        self._pump(
            lambda: not any(link.has_to_send for link in self.links.values()),
            *self._ears,
        )

    def _report(self, workers, report):
        payload = _pack(report.reached, report.view, report.finished, report.has_result)
        for worker in workers:
            frame = Frame(Kind.REPORT, self.view, 0, len(payload))
            self.links[worker].queue(frame, payload)

    def _hear(self, worker, frame, payload):
        """Takes a control frame in."""
        if frame.kind == Kind.LEAVE:
            self.links[worker].reason = bytes(payload).decode(errors="replace")
            self.links[worker].is_open = False
        elif frame.kind == Kind.REPORT:
            view, finished, has_result, workers = _unpack(payload)
            if view >= self.view:
                self._reports[worker] = _Report(view, finished, has_result, workers)
        elif frame.kind == Kind.VIEW:
            view, finished, _, workers = _unpack(payload)
            if view > self.view:
                self._decision = view, finished, tuple(sorted(workers))
        elif frame.kind == Kind.JOIN:
            self.invitation = payload

    def _pump(self, is_over, place, arrived):
        """Moves bytes until `is_over`, and returns whether it is in time."""
        with selectors.DefaultSelector() as selector:
            links = [link for link in self.links.values() if link.is_open]
            for link in links:
                # One may be held, or hold what TLS has decrypted, or why it has left.
                self._read(link, place, arrived)
                link.send()
            watched = {}
            while not is_over():
                for link in links:
                    _watch(selector, link, watched)
                left = self._deadline - time.monotonic()
                ready = selector.select(min(left, _BEAT_SECONDS)) if left > 0 else []
                if not ready and self.others:
                    # It waits, which `timeout` bounds: another one is to blame.
                    heartbeat.beat()
                if not ready and left <= 0:
                    return False
                for key, events in ready:
                    link = key.fileobj
                    if events & _WRITE:
                        link.send()
                    if events & _READ:
                        self._read(link, place, arrived)
        return True

    @staticmethod
    def _read(link, place, arrived):
        for frame, payload in link.receive(place):
            arrived(link.worker, frame, payload)


def _watch(selector, link, watched):
    wanted = 0
    if link.is_open:
        wanted = _WRITE * link.has_to_send | _READ * (not link.is_held)
    if watched.get(link, 0) == wanted:
        return
    if watched.get(link):
        selector.unregister(link)
    if wanted:
        selector.register(link, wanted)
    watched[link] = wanted


def _bytes(array):
    return memoryview(array.view(np.uint8)) if array.size else _NOTHING


def _pack(workers, view, finished, has_result):
    text = ",".join(map(str, sorted(workers))).encode()
    return memoryview(_STATUS.pack(view, finished, has_result) + text)


def _unpack(payload):
    view, finished, has_result = _STATUS.unpack_from(payload)
    text = bytes(payload[_STATUS.size :]).decode()
    workers = frozenset(int(part) for part in text.split(",") if part)
    return view, finished, has_result, workers


def _describe(frame):
    return f"{Kind(frame.kind).name.lower()} of {frame.length} bytes"
