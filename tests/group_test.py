"""Tests of `tf_psops.transport.group`: workers are threads of one process."""

import contextlib
import os
import pathlib
import socket
import tempfile
import threading
import time
from concurrent import futures
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from tf_psops import heartbeat
from tf_psops.transport import group as group_lib
from tf_psops.transport import membership, rendezvous

_SECONDS = 30


def _addresses(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{free.getsockname()[1]}" for free in sockets]


def _run(workers, function):
    """Returns what `function(index)` returns on every worker."""
    with futures.ThreadPoolExecutor(len(workers)) as pool:
        results = [pool.submit(function, index) for index in workers]
        return [result.result(_SECONDS) for result in results]


class Cluster:
    """Makes the groups of some workers, in threads of this process."""

    def __init__(self, count, min_workers=None, timeout=20):
        self.addresses = _addresses(count)
        self._min_workers = count if min_workers is None else min_workers
        self._timeout = timeout

    def start(self, index, seconds=10, secret=b"", **identity):
        group = group_lib.connect(
            index,
            self.addresses,
            self._min_workers,
            seconds,
            identity=identity,
            secret=secret,
            tls=None,
        )
        group._membership.timeout = self._timeout
        return group

    def start_all(self):
        return _run(range(len(self.addresses)), self.start)


def _vector(worker, size, dtype="float32"):
    return (np.arange(size) % 97 + 100 * worker).astype(dtype)


def _sum(group, vector):
    """Returns the sum of all members' vectors, as one transaction."""

    def work():
        memory = np.empty_like(vector)

        def add(shares, out):
            first, *others = shares  # One of them may lie in `out`.
            np.add(first, others[0] if others else 0, out=out)
            for share in others[1:]:
                out += share

        return group.all_reduce(vector, memory, add)

    return group.transaction(work)


class CollectivesTest(parameterized.TestCase):
    @parameterized.product(
        workers=(2, 3, 5), size=(1, 64, 1000, 1_500_001), dtype=("float32", "float16")
    )
    def test_moves(self, workers, size, dtype):
        groups = Cluster(workers).start_all()
        vectors = [_vector(worker, size, dtype) for worker in range(workers)]

        def work(index):
            group = groups[index]
            got = [
                group.transaction(
                    lambda root=root: group.broadcast(
                        vectors[index], root, np.empty(size, dtype)
                    )
                )
                for root in range(workers)
            ]
            return _sum(group, vectors[index]), got, group.gather(vectors[index][:3])

        for total, got, heard in _run(range(workers), work):
            np.testing.assert_array_equal(heard, [v[:3] for v in vectors])
            np.testing.assert_array_equal(total, sum(vectors))
            for one, vector in zip(got, vectors, strict=True):
                self.assertEqual(one.dtype, dtype)
                np.testing.assert_array_equal(one, vector)

    def test_different_collectives_are_an_error_on_all(self):
        groups = Cluster(2).start_all()

        def work(index):
            with self.assertRaisesRegex((ValueError, RuntimeError), "same order|gone"):
                groups[index].gather(np.zeros(3 + index))

        _run(range(2), work)

    def test_late_worker_is_an_error(self):
        groups = Cluster(2, timeout=0.5).start_all()
        with self.assertRaisesRegex(TimeoutError, r"timeout=0.5 seconds.*\[1\]"):
            groups[0].gather(np.zeros(3))
        groups[1].gather(np.zeros(3))  # What the other sent is there.
        with self.assertRaisesRegex(RuntimeError, "waited for timeout"):
            groups[1].gather(np.zeros(3))

    def test_a_swarm_of_other_settings_may_come_after_one_that_is_over(self):
        """Whoever makes its strategy first calls one that has not yet."""
        cluster = Cluster(2)
        before = cluster.start_all()
        before[1].end("one failed")
        with self.assertRaises(RuntimeError):
            before[0].gather(_vector(0, 3))
        with futures.ThreadPoolExecutor(2) as pool:
            first = pool.submit(cluster.start, 0, devices=2)
            time.sleep(1)
            second = pool.submit(cluster.start, 1, devices=2)
            for group in (first.result(_SECONDS), second.result(_SECONDS)):
                self.assertEqual(group.members, (0, 1))

    def test_a_worker_that_leaves_says_why(self):
        groups = Cluster(3).start_all()
        groups[1].end("a reason of its own")
        for index in (0, 2):
            with self.assertRaisesRegex(RuntimeError, "a reason of its own"):
                groups[index].gather(np.zeros(3))


class MembershipTest(parameterized.TestCase):
    def _drop(self, group):
        """Lets a worker vanish, as by SIGKILL."""
        group._rendezvous.close()
        for link in group._membership.links.values():
            link.hang_up()

    @parameterized.parameters(0, 1, 2)
    def test_goes_on_without_a_worker_that_is_killed(self, lost):
        groups = Cluster(3, min_workers=2).start_all()
        vectors = [_vector(worker, 1_000_000) for worker in range(3)]
        self._drop(groups[lost])
        left = [worker for worker in range(3) if worker != lost]

        def work(index):
            group = groups[index]
            return _sum(group, vectors[index]), group.gather(np.array([index]))

        for index, (total, table) in zip(left, _run(left, work)):
            np.testing.assert_array_equal(total, sum(vectors[w] for w in left))
            self.assertIsNone(table[lost])
            self.assertEqual(groups[index].members, tuple(left))
        self.assertEqual([groups[w].is_chief for w in left], [True, False])

    @parameterized.parameters(0, 1, 2)
    def test_goes_on_without_a_worker_that_hangs(self, lost):
        groups = Cluster(3, min_workers=2, timeout=1).start_all()
        left = [worker for worker in range(3) if worker != lost]
        for _ in range(2):
            for table in _run(left, lambda i: groups[i].gather(np.array([i]))):
                self.assertEqual(
                    [row is None for row in table], [i == lost for i in range(3)]
                )
        with self.assertRaises(membership.DroppedError):
            groups[lost].gather(np.array([lost]))

    def test_one_that_waits_tells_the_launcher_so(self):
        """The one that it waits for has stopped, and is silent."""
        groups = Cluster(2).start_all()
        folder = self.enter_context(tempfile.TemporaryDirectory())
        path = os.path.join(folder, "beat")
        pathlib.Path(path).touch()
        os.utime(path, (0, 0))
        with (
            mock.patch.dict(os.environ, {"TF_PSOPS_HEARTBEAT": path}),
            mock.patch.object(heartbeat, "_next_time", 0.0),
            futures.ThreadPoolExecutor(1) as pool,
        ):
            waits = pool.submit(groups[0].gather, np.zeros(1))
            time.sleep(2.5)
            self.assertGreater(os.stat(path).st_mtime, 0)
            groups[1].gather(np.zeros(1))
            waits.result(_SECONDS)

    def test_two_lost_at_once(self):
        groups = Cluster(5, min_workers=3).start_all()
        for lost in (0, 3):
            self._drop(groups[lost])
        left = [1, 2, 4]
        for table in _run(left, lambda i: groups[i].gather(np.array([i]))):
            self.assertEqual(
                [row is None for row in table], [True, False, False, True, False]
            )

    def test_too_few_are_an_error(self):
        groups = Cluster(3, min_workers=2).start_all()
        for lost in (0, 1):
            self._drop(groups[lost])
        with self.assertRaisesRegex(
            membership.DroppedError, "fewer than min_workers=2"
        ):
            groups[2].gather(np.array([2]))

    def test_of_two_halves_that_with_worker_0_goes_on(self):
        groups = Cluster(4, min_workers=2, timeout=1.5).start_all()
        for one in (0, 1):
            for other in (2, 3):
                groups[one]._membership.links[other].hang_up()

        def work(index):
            try:
                return [row is None for row in groups[index].gather(np.array([index]))]
            except membership.DroppedError:
                return "dropped"

        kept = [False, False, True, True]
        self.assertEqual(_run(range(4), work), [kept, kept, "dropped", "dropped"])

    @parameterized.parameters(0, 2)
    def test_two_that_cannot_reach_each_other(self, seed):
        groups = Cluster(3, min_workers=2, timeout=1.5).start_all()
        groups[1]._membership.links[2].hang_up()

        def work(index):
            try:
                return [row is None for row in groups[index].gather(np.array([index]))]
            except membership.DroppedError:
                return "dropped"

        kept = [False, False, True]
        self.assertEqual(_run(range(3), work), [kept, kept, "dropped"])

    def test_a_commit_that_one_has_made_is_made_by_all(self):
        """A worker dies after one of the others has heard its commit."""
        groups = Cluster(3, min_workers=2).start_all()
        calls = [0, 0, 0]

        def work(index):
            group = groups[index]

            def gather():
                calls[index] += 1
                return group._gather(np.array([index]))

            first = group.transaction(gather)
            second = group.transaction(gather)
            return [row is None for row in first], [row is None for row in second]

        # Worker 2 commits to worker 0 alone.
        exchange = groups[2]._membership.exchange

        def faulty(kind, outgoing, incoming):
            if kind == group_lib.Kind.COMMIT:
                exchange(kind, {0: outgoing[0]}, incoming)
                time.sleep(0.3)
                self._drop(groups[2])
                raise membership.DroppedError("killed")
            exchange(kind, outgoing, incoming)

        groups[2]._membership.exchange = faulty

        def run(index):
            if index == 2:
                with self.assertRaises(membership.DroppedError):
                    work(index)
                return None
            return work(index)

        results = _run(range(3), run)
        none, without = [False] * 3, [False, False, True]
        self.assertEqual(results[:2], [(none, without)] * 2)

    @parameterized.parameters(0, 1, 2)
    def test_a_worker_joins_again(self, lost):
        cluster = Cluster(3, min_workers=2)
        groups = cluster.start_all()
        self._drop(groups[lost])
        left = [worker for worker in range(3) if worker != lost]
        come = threading.Event()

        def stay(index):
            group = groups[index]
            for _ in range(200):
                group.transaction(lambda: group._gather(np.array([0])), admits=True)
                if group.candidate is not None:
                    group.admit(lambda: np.frombuffer(b"state", np.uint8))
                    return group.gather(np.array([index]))
                time.sleep(0.02)

        def join():
            group = cluster.start(lost)
            self.assertTrue(group.is_joining)
            self.assertFalse(group.is_chief)
            state = group.join(10)
            group.enter()
            come.set()
            return bytes(state), group.gather(np.array([lost])), group

        with futures.ThreadPoolExecutor(1) as pool:
            joined = pool.submit(join)
            tables = _run(left, stay)
            state, table, group = joined.result(_SECONDS)
        self.assertEqual(state, b"state")
        self.assertEqual(group.members, (0, 1, 2))
        self.assertEqual(group.is_chief, lost == 0)
        for one in (*tables, table):
            np.testing.assert_array_equal(one, [[0], [1], [2]])

    def _join_again(self, cluster, groups, lost):
        """Drops workers, and returns what all say when these have joined again."""
        for worker in lost:
            self._drop(groups[worker])
        left = [index for index in range(len(groups)) if index not in lost]
        _run(left, lambda index: groups[index].gather(np.array([index])))

        def stay(group):
            while len(group.members) < len(groups):
                group.transaction(lambda: group._gather(np.array([0])), admits=True)
                if group.candidate is not None:
                    group.admit(lambda: np.zeros(0, np.uint8))
                time.sleep(0.01)
            return group.gather(np.array([group.index]))

        def work(index):
            if index not in lost:
                return stay(groups[index])
            group = cluster.start(index)
            group.join(10)
            group.enter()
            return stay(group)

        return _run(range(len(groups)), work)

    @parameterized.parameters(0, 1, 2)
    def test_let_in_before_it_has_heard_of_it(self, slow):
        """Where the answer of a member takes longer than all members' agreement."""
        cluster = Cluster(3, min_workers=2)
        groups = cluster.start_all()
        lost, call = (slow + 1) % 3, rendezvous.handshake.call
        place = tuple(cluster.addresses[slow].split(":"))

        def slowly(connection, *args):
            answer = call(connection, *args)
            if connection.getpeername() == (place[0], int(place[1])):
                time.sleep(0.5)
            return answer

        with mock.patch.object(rendezvous.handshake, "call", slowly):
            tables = self._join_again(cluster, groups, [lost])
        for table in tables:
            np.testing.assert_array_equal(table, [[0], [1], [2]])

    def test_the_new_connection_is_not_taken_for_the_old_one(self):
        cluster = Cluster(3, min_workers=2)
        groups = cluster.start_all()
        for group in groups:
            returned = group._rendezvous._returned

            def slowly(worker, returned=returned):
                time.sleep(0.5)
                returned(worker)

            group._rendezvous._returned = slowly
        for table in self._join_again(cluster, groups, [2]):
            np.testing.assert_array_equal(table, [[0], [1], [2]])

    @parameterized.parameters(([2, 3],), ([1, 3],), ([0, 2],))
    def test_two_join_at_once(self, lost):
        cluster = Cluster(5, min_workers=3)
        groups = cluster.start_all()
        for table in self._join_again(cluster, groups, lost):
            np.testing.assert_array_equal(table, [[0], [1], [2], [3], [4]])

    def test_a_worker_that_was_dropped_comes_back(self):
        groups = Cluster(3, min_workers=2, timeout=3).start_all()
        left = (0, 1)
        _run(left, lambda i: groups[i].gather(np.array([i])))

        def stay(index):
            group = groups[index]
            for _ in range(200):
                group.transaction(lambda: group._gather(np.array([0])), admits=True)
                if group.candidate is not None:
                    group.admit(lambda: np.zeros(0, np.uint8))
                    return group.gather(np.array([index]))
                time.sleep(0.02)

        def come_back():
            with self.assertRaises(membership.DroppedError):
                groups[2].gather(np.array([2]))
            self.assertTrue(groups[2].come_back())
            groups[2].join(10)
            groups[2].enter()
            return groups[2].gather(np.array([2]))

        with futures.ThreadPoolExecutor(1) as pool:
            back = pool.submit(come_back)
            tables = _run(left, stay)
            tables.append(back.result(_SECONDS))
        for table in tables:
            np.testing.assert_array_equal(table, [[0], [1], [2]])


class StartTest(parameterized.TestCase):
    def test_one_missing_is_an_error(self):
        cluster = Cluster(2)
        with self.assertRaisesRegex(TimeoutError, "startup_timeout=0.5.*1: 'nobody"):
            cluster.start(0, 0.5)

    def test_enough_go_on_and_the_missing_one_joins_later(self):
        cluster = Cluster(3, min_workers=2)
        groups = _run((0, 2), lambda i: cluster.start(i, 1))
        for table in _run((0, 1), lambda i: groups[i].gather(np.array([i]))):
            self.assertIsNone(table[1])
        self.assertEqual(groups[0].members, (0, 2))
        self.assertTrue(cluster.start(1).is_joining)

    def test_settings_that_differ_are_an_error_on_all(self):
        cluster = Cluster(3)

        def start(index):
            with self.assertRaisesRegex(
                (ValueError, TimeoutError), "different version|nobody"
            ) as caught:
                cluster.start(index, 3, version=f"{index // 2}")
            return str(caught.exception)

        self.assertIn("worker 0 has '0', worker 2 has '1'", _run(range(3), start)[0])

    def test_another_secret_is_an_error(self):
        cluster = Cluster(2)

        def start(index):
            with self.assertRaisesRegex((ValueError, TimeoutError), "secret|nobody"):
                cluster.start(index, 2, secret=b"ab"[: index + 1])

        _run(range(2), start)

    def test_an_address_in_use_is_an_error_that_names_it(self):
        cluster = Cluster(2)
        port = int(cluster.addresses[0].rpartition(":")[2])
        with (
            socket.create_server(("127.0.0.1", port)),
            self.assertRaisesRegex(OSError, f"{cluster.addresses[0]}.*use"),
        ):
            cluster.start(0)

    def test_strangers_hold_nobody_up(self):
        cluster = Cluster(2)
        host, port = cluster.addresses[0].split(":")
        stop = threading.Event()
        open_ones = []

        def bother():
            number = 0
            while not stop.is_set():
                with contextlib.suppress(OSError):
                    stranger = socket.create_connection((host, int(port)), 1)
                    open_ones.append(stranger)
                    number += 1
                    if number % 3:
                        stranger.sendall(
                            [
                                b"",
                                b"GET / HTTP/1.1\r\n\r\n",
                                b"tf_psops-swarm-1" + b"x" * 64,
                            ][number % 3]
                        )
                time.sleep(0.002)

        thread = threading.Thread(target=bother)
        thread.start()
        try:
            time.sleep(0.5)
            start = time.monotonic()
            groups = cluster.start_all()
            self.assertLess(time.monotonic() - start, 5)
            for table in _run(range(2), lambda i: groups[i].gather(np.array([i]))):
                np.testing.assert_array_equal(table, [[0], [1]])
        finally:
            stop.set()
            thread.join()
            for one in open_ones:
                one.close()


if __name__ == "__main__":
    absltest.main()
