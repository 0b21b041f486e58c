"""Tests of `tf_psops.transport.connections`: workers are threads of one process."""

import contextlib
import socket
import threading
import time
from concurrent import futures

import numpy as np
import tensorflow as tf
from absl.testing import parameterized

from tf_psops.transport import connections as wire_lib

_SECONDS = 20


class _Telling:
    """What the workers tell each other, as by a collective."""

    def __init__(self, num_workers):
        self._rows = [None] * num_workers
        self._barrier = threading.Barrier(num_workers, timeout=_SECONDS)

    def by(self, index, change=lambda row: row):
        def tell(row):
            self._rows[index] = change(row)
            self._barrier.wait()
            table = np.array(self._rows, np.float64)
            self._barrier.wait()
            return table

        return tell


def _run(num_workers, function):
    """Returns what `function(index)` returns on every worker."""
    with futures.ThreadPoolExecutor(num_workers) as pool:
        results = [pool.submit(function, index) for index in range(num_workers)]
        return [result.result(_SECONDS) for result in results]


def _wires(num_workers, change=lambda row: row):
    telling = _Telling(num_workers)
    hosts = ["127.0.0.1"] * num_workers
    return _run(
        num_workers, lambda i: wire_lib.connect(i, hosts, telling.by(i, change))
    )


def _vector(worker, size, dtype="float32"):
    return (np.arange(size) % 97 + 100 * worker).astype(dtype)


def _scatter(wire, vector):
    rows = len(wire._sockets), wire.share_length(len(vector))
    return wire.scatter(vector, np.empty(rows, vector.dtype))


class WireTest(parameterized.TestCase):
    @parameterized.product(
        workers=(2, 3, 5), size=(1, 64, 1000, 1_500_001), dtype=("float32", "float16")
    )
    def test_moves(self, workers, size, dtype):
        wires = _wires(workers)
        vectors = [_vector(worker, size, dtype) for worker in range(workers)]

        def work(index):
            wire = wires[index]
            shares = _scatter(wire, vectors[index])
            self.assertLen(shares, workers)
            gathered = wire.gather(sum(shares), np.empty(size, dtype))
            got = [
                wire.broadcast(vectors[index], root, np.empty(size, dtype))
                for root in range(workers)
            ]
            return gathered, got, wire.tell(vectors[index][:3])

        told = np.concatenate([vector[:3] for vector in vectors])
        for gathered, got, heard in _run(workers, work):
            np.testing.assert_array_equal(heard, told)
            np.testing.assert_array_equal(gathered, sum(vectors))
            for one, vector in zip(got, vectors, strict=True):
                self.assertEqual(one.dtype, dtype)
                np.testing.assert_array_equal(one, vector)

    def test_each_worker_sends_and_gets_a_vector_at_most_twice(self):
        """The bytes on the lines, whatever the number of workers."""
        size, workers = 1_000_000, 4
        wires = _wires(workers)
        sent = [0] * workers

        class Counting:
            def __init__(self, link, worker):
                self._link, self._worker = link, worker

            def send(self, view):
                count = self._link.send(view)
                sent[self._worker] += count
                return count

            def __getattr__(self, name):
                return getattr(self._link, name)

        for index, wire in enumerate(wires):
            wire._sockets = {w: Counting(s, index) for w, s in wire._sockets.items()}

        def work(index):
            vector = _vector(index, size)
            mean = sum(_scatter(wires[index], vector))
            wires[index].gather(mean, np.empty_like(vector))
            mean, sent[index] = sent[index], 0
            wires[index].broadcast(vector, 1, np.empty_like(vector))
            return mean / vector.nbytes, sent[index] / vector.nbytes

        means, broadcasts = zip(*_run(workers, work))
        np.testing.assert_allclose(means, 2 * 3 / 4, rtol=1e-3)
        np.testing.assert_allclose(broadcasts, [2 / 3, 1, 2 / 3, 2 / 3], rtol=1e-3)

    def test_a_worker_that_is_gone_is_an_error(self):
        wires = _wires(3)

        def work(index):
            if index == 2:
                time.sleep(0.3)
                for link in wires[2]._sockets.values():
                    link.close()
                return None
            with self.assertRaisesRegex(ConnectionError, "closed|reset|cut"):
                _scatter(wires[index], _vector(index, 1_000_000))
            self.assertTrue(wires[index].is_cut)
            with self.assertRaisesRegex(ConnectionError, "cut"):
                wires[index].broadcast(_vector(index, 10), 0, _vector(index, 10))

        _run(3, work)

    def test_cut_ends_a_wait(self):
        wires = _wires(2)
        threading.Timer(0.3, wires[0].cut).start()
        start = time.monotonic()
        with self.assertRaises(ConnectionError):
            wires[0].broadcast(_vector(0, 10), 1, _vector(0, 10))
        self.assertLess(time.monotonic() - start, 5)
        with self.assertRaises(ConnectionError):  # The other one, too.
            wires[1].broadcast(_vector(1, 10), 0, _vector(1, 10))

    def test_strangers_are_left_out(self):
        calls = []

        def call_first(row):
            # After the ports, with another secret, or without a word.
            if row[0] > 1 and not calls:
                calls.append(socket.create_connection(("127.0.0.1", row[0])))
                calls[0].sendall(b"x" * 12)
            return row

        wires = _wires(3, call_first)
        for index, got in enumerate(
            _run(3, lambda i: wires[i].gather(_vector(i, 64), _vector(i, 192)))
        ):
            expected = np.concatenate([_vector(worker, 64) for worker in range(3)])
            np.testing.assert_array_equal(got, expected, str(index))

    def test_none_where_one_cannot_be_reached(self):
        with contextlib.ExitStack() as stack:
            closed = stack.enter_context(socket.socket())
            closed.bind(("127.0.0.1", 0))  # Nobody listens there.
            port = closed.getsockname()[1]
            limit = wire_lib._SECONDS
            stack.callback(setattr, wire_lib, "_SECONDS", limit)
            wire_lib._SECONDS = 1

            def change(row):
                return [port, row[1]] if row[0] > 1 else row

            self.assertEqual(_wires(3, change), [None] * 3)


if __name__ == "__main__":
    tf.test.main()
