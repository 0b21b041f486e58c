"""Collectives between the workers of a swarm, whoever of them is there.

The bytes go from where a vector lies straight into the socket, and from the socket to
where it will lie. This module knows bytes and workers; it does not import TensorFlow.
"""

import contextlib
import time

import numpy as np
from absl import logging

from tf_psops.transport import link as link_lib
from tf_psops.transport import membership as membership_lib
from tf_psops.transport import rendezvous as rendezvous_lib
from tf_psops.transport.link import Kind

_ALIGNMENT = 64  # Elements; TensorFlow takes what begins there without a copy.
_REACH_SECONDS = 5
_REMEDY = (
    "The workers are no swarm any more: start all of them again, from a backup if "
    "there is one."
)


class Group:
    """Joins this worker to the others of its swarm.

    All members must call the same functions in the same order, with vectors of the same
    size and type. A vector has a share for each member, of almost equal sizes. What
    comes in goes to memory that the caller gives, who may have some to use again: the
    system clears new memory first.

    Args:
        membership: A `Membership`.
        rendezvous: The `Rendezvous` at which other workers may come later.
        joins: Whether this worker has to `join` a swarm that runs.

    Attributes:
        is_elastic: Whether the swarm goes on without a worker that is lost.
        is_alone: Whether this worker does by itself what is to be taken back.
        occasion: What the members meet for, to name it in errors.
        is_joining: Whether this worker is not yet in the swarm. It is alone until then.
    """

    def __init__(self, membership, rendezvous, joins):
        self._membership = membership
        self._rendezvous = rendezvous
        self.is_elastic = membership.min_workers < membership.num_workers
        self._in_transaction = False
        self.is_alone = False
        self._error = None
        self._raised = None
        self._candidates = ()
        self.occasion = ""
        self.is_joining = joins

    @property
    def index(self):
        """Returns the place of this worker."""
        return self._membership.index

    @property
    def num_workers(self):
        """Returns the number of workers of the cluster, there or not."""
        return self._membership.num_workers

    @property
    def min_workers(self):
        """Returns how many workers the swarm needs."""
        return self._membership.min_workers

    @property
    def members(self):
        """Returns the workers that are in the swarm, a sorted tuple."""
        return self._membership.members

    @property
    def is_chief(self):
        """Tells whether this worker is the lowest that is there: it writes files."""
        return self.index == self.members[0] and not self.is_joining

    @property
    def is_over(self):
        """Tells whether the members can do nothing together any more."""
        return self._error is not None

    @contextlib.contextmanager
    def barrier(self, occasion, timeout):
        """Names what the members meet for in a `with` block, and bounds the waits."""
        before = self.occasion, self._membership.timeout
        self.occasion, self._membership.timeout = occasion, timeout
        self._raised = None
        try:
            yield
        except Exception as error:
            # TensorFlow raises another one, where a graph has called.
            if self._raised in (None, error):
                raise
            raise self._raised from error
        finally:
            self.occasion, self._membership.timeout = before

    @contextlib.contextmanager
    def alone(self):
        """Lets collectives in a `with` block be of this worker alone."""
        self.is_alone = True
        try:
            yield
        finally:
            self.is_alone = False

    # Transactions.

    def transaction(self, work, admits=False):
        """Does something in common: on all members that are left, or on none.

        Args:
            work: A function that uses the collectives below, and changes nothing
                else. It is called again if a member is lost.
            admits: Whether a worker that waits may `admit` itself afterwards.

        Returns:
            What `work` returned.

        Raises:
            RuntimeError: If another worker has failed or is gone, and the swarm cannot
                go on without it.
            TimeoutError: If it cannot go on, and another worker has not come in time.
            DroppedError: If the others go on without this worker.
        """
        if self._is_by_itself or self._in_transaction:
            return work()
        if self._error:
            raise RuntimeError(
                f"Worker {self.index} cannot go on at {self.occasion}: the swarm is at "
                f"an end ({self._error}). {_REMEDY}"
            ) from self._error
        self._in_transaction = True
        try:
            return self._until_committed(work, admits)
        except (
            RuntimeError,
            TimeoutError,
            ValueError,
            membership_lib.DroppedError,
        ) as error:
            self._raised = error
            raise
        finally:
            self._in_transaction = False

    def _until_committed(self, work, admits):
        membership = self._membership
        self._candidates = ()
        while True:
            has_result, result = False, None
            try:
                result, has_result = work(), True
                if self.is_elastic:
                    words = self._commit(self._waiting() if admits else b"")
                    self._candidates = self._common(words) if admits else ()
                return result
            except Exception:
                lost, self._raised = self._raised, None
                if not isinstance(lost, membership_lib.LostError):
                    if isinstance(lost, ValueError):  # At different collectives.
                        self.end(f"Worker {self.index}: {lost}")
                        raise lost from None
                    raise
                if not self.is_elastic:
                    self._fail(lost)
                before = self.members
                if membership.change_view(has_result):
                    return result
                logging.warning(
                    "Workers %s are lost at %s (%s). Workers %s go on.",
                    sorted(set(before) - set(self.members)),
                    self.occasion,
                    lost,
                    list(self.members),
                )

    @property
    def _is_by_itself(self):
        return self.is_alone or self.is_joining or self.num_workers == 1

    def _waiting(self):
        waiting = self._rendezvous.waiting() - set(self.members)
        return bytes(worker in waiting for worker in range(self.num_workers))

    @staticmethod
    def _common(words):
        """Returns who waits for all members: one at a time."""
        common = np.all(words, axis=0)
        return tuple(np.flatnonzero(common)[:1].tolist())

    def _fail(self, lost):
        """Ends the swarm, whose members are all needed."""
        timeout = self._membership.timeout
        if lost.late:
            waited = f"waited for timeout={timeout:g} seconds"
            error = TimeoutError(
                f"Worker {self.index} {waited} for all others to come to "
                f"{self.occasion}; workers {sorted(lost.late)} did not. Expected them "
                "in time: see what they do. Give every worker as many steps, "
                "evaluations and calls of `fit`, or wait longer with "
                f"SwarmStrategy(timeout=...). {_REMEDY}"
            )
            self.end(f"Worker {self.index} {waited} for {self.occasion}.")
        else:
            error = RuntimeError(
                f"Worker {self.index} cannot go on at {self.occasion}, because another "
                f"worker failed or is gone ({lost}). Look at the output of that "
                f"worker. {_REMEDY}"
            )
            self.end(str(lost))
        self._error = error
        raise error from lost

    def end(self, text):
        """Ends what joins the workers, on all of them, and says why.

        Without all members the swarm goes on if it needs not all of them.
        """
        if self.num_workers == 1 or self._error:
            return
        self._error = RuntimeError(text)
        # A worker whose next swarm has other settings calls here for this one's.
        self._rendezvous.close()
        self._membership.leave(text)
        for link in self._membership.links.values():
            link.hang_up()

    def close(self):
        """Closes all connections, and listens no more."""
        self._error = self._error or RuntimeError("closed")
        self._rendezvous.close()
        for link in self._membership.links.values():
            link.close()

    # Joining.

    @property
    def candidate(self):
        """Returns the worker that all members can admit now, `None` without one."""
        return self._candidates[0] if self._candidates else None

    def admit(self, state):
        """Lets the `candidate` in: it takes part from the next transaction on.

        Args:
            state: A function that returns what it needs to join, a flat NumPy array of
                bytes. It is called on the lowest member.

        Returns:
            The worker.
        """
        membership, worker = self._membership, self.candidate
        self._candidates = ()
        sponsor = self.is_chief
        membership.admit(worker, self._rendezvous.take(worker))
        if sponsor:
            membership.invite(worker, state())
        logging.warning("Worker %d joins at %s.", worker, self.occasion)
        return worker

    def enter(self):
        """Takes part from here on, after `join`."""
        self.is_joining = False
        self._rendezvous.run()

    def join(self, seconds):
        """Waits until the members let this worker in, who then wait for it to `enter`.

        Returns:
            What they sent for it, a `memoryview` of bytes.

        Raises:
            TimeoutError: If they have not after some seconds.
        """
        membership = self._membership
        deadline = time.monotonic() + seconds
        self._rendezvous.join()
        while time.monotonic() < deadline:
            self._take_links()
            state = membership.await_invitation(0.2)
            if state is not None:
                self._reach_members()
                for worker in set(membership.links) - set(membership.others):
                    # It waits to join as well.
                    self._rendezvous.put_back(worker, membership.links.pop(worker))
                return state
        raise TimeoutError(
            f"Worker {self.index} has waited for {seconds:g} seconds to join the "
            "swarm, which has come to no synchronisation. Expected `fit` to go on "
            "there. See whether it has ended, or wait longer with "
            "SwarmStrategy(timeout=...)."
        )

    def _reach_members(self):
        """Waits for the links to all members, who may be ahead of this worker.

        They may have let it in before it has heard their answer to its call.
        """
        membership = self._membership
        deadline = time.monotonic() + _REACH_SECONDS
        while not set(membership.others) <= set(membership.links):
            self._take_links()
            time.sleep(0.001)
            if time.monotonic() > deadline:
                break
        for worker in set(membership.others) - set(membership.links):
            membership.links[worker] = link_lib.Link.to_nobody(worker)

    def _take_links(self):
        for worker in self._rendezvous.waiting():
            self._membership.links[worker] = self._rendezvous.take(worker)

    def come_back(self):
        """Gets ready to `join` the others again, who have gone on without this worker.

        Returns:
            Whether any of them runs.
        """
        for link in self._membership.links.values():
            link.close()
        self._membership.links.clear()
        self._membership.begin(0, (self.index,))
        self.is_joining = self._rendezvous.finds_swarm()
        return self.is_joining

    # Collectives.

    def gather(self, vector):
        """Returns each worker's vector, a list; `None` in the place of one not there.

        Args:
            vector: A flat NumPy array, not many elements.
        """
        vector = np.ascontiguousarray(vector)
        return self.transaction(lambda: self._gather(vector))

    def _gather(self, vector):
        got = {worker: np.empty_like(vector) for worker in self._others}
        self._exchange(Kind.GATHER, dict.fromkeys(got, vector), got)
        got[self.index] = vector
        return [got.get(worker) for worker in range(self.num_workers)]

    def all_reduce(self, vector, memory, reduce):
        """Returns what all members' vectors are reduced to, a NumPy array.

        Every member reduces its share of them, and sends that to all.

        Args:
            vector: A flat NumPy array.
            memory: A flat array of the vector's size to fill.
            reduce: A function of all members' values of one share, a list in their
                order, and of the array to write the result to, which may be the first
                or the second of them.
        """
        return self.all_gather(self.reduce_scatter(vector, memory, reduce))

    def reduce_scatter(self, vector, memory, reduce):
        """Returns `memory` with this worker's share in its place, see `all_reduce`.

        The rest of it holds anything.
        """
        shares = self._shares(len(vector), self.present)
        mine = shares[self.index]
        # What comes in goes to where results will be: the first one's to this worker's,
        # others' to the others', none of it to the last share, which is shorter.
        places = [mine, *(shares[worker] for worker in self._others)]
        got = {
            worker: _start_of(memory[place], len(vector[mine]))
            for worker, place in zip(self._others, places)
        }
        self._exchange(Kind.SCATTER, {w: vector[shares[w]] for w in got}, got)
        got[self.index] = vector[mine]
        reduce([got[worker] for worker in shares], memory[mine])
        return memory

    def all_gather(self, vector):
        """Returns a vector, a flat NumPy array, with each member's share of it."""
        self._spread(vector, self._shares(len(vector), self.present), self._others)
        return vector

    def share(self, size):
        """Returns the slice of a vector that is this worker's share."""
        return self._shares(size, self.members)[self.index]

    def broadcast(self, vector, root, memory):
        """Returns the vector of the worker `root`, a NumPy array.

        Each of the others gets a share from it, and passes it on: the root's own line
        carries the vector once.

        Args:
            vector: A flat NumPy array.
            root: A member.
            memory: On other workers than `root` a flat array of the vector's size to
                fill.
        """
        others = [worker for worker in self.present if worker != root]
        if not others:
            return vector
        shares = self._shares(len(vector), others)
        if self.index == root:
            outgoing = {w: vector[shares[w]] for w in others}
            self._exchange(Kind.BROADCAST, outgoing, {})
            self._exchange(Kind.SHARE, {}, {})  # All count the same collectives.
            return vector
        self._exchange(Kind.BROADCAST, {}, {root: memory[shares[self.index]]})
        self._spread(memory, shares, [w for w in others if w != self.index])
        return memory

    @property
    def present(self):
        """Returns the workers that take part: the members, or this one by itself."""
        return (self.index,) if self._is_by_itself else self.members

    @property
    def _others(self):
        return [worker for worker in self.present if worker != self.index]

    def _spread(self, vector, shares, others):
        """Sends this worker's share to some workers, and fills in theirs."""
        mine = vector[shares[self.index]]
        self._exchange(
            Kind.SHARE,
            dict.fromkeys(others, mine),
            {worker: vector[shares[worker]] for worker in others},
        )

    def _exchange(self, kind, outgoing, incoming):
        if self._is_by_itself:
            return
        self._membership.limit()
        try:
            self._membership.exchange(kind, outgoing, incoming)
        except (membership_lib.LostError, ValueError) as error:
            self._raised = error
            raise

    def _commit(self, word):
        """Ends a transaction, in which each member tells the others a few bytes."""
        mine = np.frombuffer(word, np.uint8)
        got = {worker: np.empty_like(mine) for worker in self._others}
        self._exchange(Kind.COMMIT, dict.fromkeys(got, mine), got)
        self._membership.finished += 1
        return [mine, *got.values()]

    @staticmethod
    def _shares(size, workers):
        """Returns a dict from each worker to the slice that is its share."""
        length = -(-size // (len(workers) * _ALIGNMENT)) * _ALIGNMENT
        return {
            worker: slice(min(place * length, size), min((place + 1) * length, size))
            for place, worker in enumerate(workers)
        }


def _start_of(memory, size):
    """Returns `size` elements of an array; new ones of one that is too short."""
    return memory[:size] if size <= len(memory) else np.empty(size, memory.dtype)


def shared(index, addresses, min_workers, *args, **kwargs):
    """Returns the group of this process' place in a cluster, one for all strategies.

    Args:
        index: See `connect`, and so for all others.
        addresses: See `connect`.
        min_workers: See `connect`.
        *args: Further arguments of `connect`.
        **kwargs: Further arguments of `connect`.

    Raises:
        ValueError: If an earlier strategy of this process needs other `min_workers`.
    """
    place = index, tuple(addresses)
    if place in _groups and _groups[place].is_over:
        _groups.pop(place).close()
    if place not in _groups:
        _groups[place] = connect(index, addresses, min_workers, *args, **kwargs)
    there = _groups[place]
    if there.min_workers != min_workers:
        raise ValueError(
            "The strategies of one process share its connections, and so one "
            f"`min_workers`. Received: min_workers={min_workers}, after an earlier "
            f"strategy with {there.min_workers}. Give both the same."
        )
    return there


_groups: dict[object, "Group"] = {}


def connect(
    index, addresses, min_workers, startup_timeout, *, identity, secret=b"", tls=None
):
    """Connects this worker to the others of its cluster.

    Args:
        index: The place of this worker.
        addresses: The "host:port" of every worker. This one listens at its own.
        min_workers: How many of them the swarm needs.
        startup_timeout: Seconds to wait for all of them. After that, `min_workers` do.
        identity: What must be the same on all workers; see `Rendezvous`.
        secret: The swarm's secret, bytes; see `handshake.read_secret`.
        tls: A `tls.TLS`, or `None`.

    Returns:
        A `Group`.

    Raises:
        OSError: If this worker cannot listen at its address.
        ValueError: If workers have different settings.
        TimeoutError: If not enough workers came in time.
    """
    members = membership_lib.Membership(index, len(addresses), min_workers)

    def returned(worker):
        """Gives up what a worker was before it started again."""
        link = members.links.get(worker)
        if link and link.is_open:
            link.hang_up()

    meeting_place = rendezvous_lib.Rendezvous(
        index,
        addresses,
        {**identity, "min_workers": min_workers},
        secret,
        tls,
        admits=min_workers < len(addresses),
        returned=returned,
    )
    try:
        joins = meeting_place.start(startup_timeout, members.is_quorum)
    except BaseException:
        meeting_place.close()
        raise
    group = Group(members, meeting_place, joins)
    if not joins:
        members.timeout = startup_timeout
        group._take_links()
        members.begin(1, (index, *members.links))
        # All have the same links, or agree on who has them.
        with group.barrier("the start", startup_timeout):
            group.gather(np.zeros(0, np.uint8))
    return group
