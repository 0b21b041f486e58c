r"""Measures how training scales with workers, intervals and networks, against SSGD.

```bash
python -m benchmarks.scaling --workers=2 --sync_intervals=10,50 --networks=100mbit
```

Real processes on this machine train a LeNet on images of MNIST's shape with Keras'
`fit`. The sides take turns in the same processes, run by run:

  * psops: `PSOSync(n)` with its default rule, for each interval n and each delay.
  * barrier: the workers only wait for each other every n steps. No synchronisation
    without a delay can be faster.
  * ssgd: synchronous SGD, by the same strategy with `share_gradients=True`.
  * local: the same strategy without any synchronisation.

Runs of a side that meets at every step are a quarter as long. A run begins on
all workers at once, after a few steps to warm up, and holds whole intervals; the
slowest worker's time counts. The ratios are medians of those in each round.

Networks other than loopback put each worker on a cable of its own to a switch, with a
token bucket on its way out; see `benchmarks.slow_network`. Where there are not the
rights to do so, they are skipped. The rate printed is that of a bare TCP transfer
between two of the workers, the bytes are what a worker's cable took, headers included.

Each worker has its share of this machine's processors to itself, as it would on a
machine of its own. Where there are more workers than processors, all share all: compare
the sides, not the numbers of workers.
"""

import contextlib
import itertools
import os
import re
import socket
import statistics
import time
from typing import NamedTuple

from absl import app, flags, logging

from benchmarks import cluster_flags, common_flags, processes, slow_network

_RIVALS = ("local", "ssgd")
# The least ratio of a side to a rival, by interval, workers and network.
_GOALS = {
    ("psops", 50, 2, "loopback", "local"): 0.97,
    ("psops", 50, 2, "100mbit", "ssgd"): 5,
}
_PROBE_SECONDS = 0.5
_WARM_UP_STEPS = 10

_SYNC_INTERVALS = flags.DEFINE_list(
    "sync_intervals",
    ["1", "10", "50"],
    "Synchronisation intervals of psops and barrier.",
)
_DELAYS = flags.DEFINE_list(
    "delays", ["0"], "Delays of psops, in steps; those below the interval count."
)
_NETWORKS = flags.DEFINE_list(
    "networks", ["loopback", "1gbit", "100mbit"], "loopback, or rates such as 100mbit."
)
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["32"], "Examples per worker and step.")
_STEPS = flags.DEFINE_integer(
    "timed_steps", 100, "Steps in each timed run.", lower_bound=1
)

cluster_flags.expect_numbers(_SYNC_INTERVALS, 1)
cluster_flags.expect_numbers(_DELAYS, 0)
flags.register_validator(
    "delays",
    # What is under way when a run ends must not be more than when it began.
    lambda texts: max(map(int, texts)) <= _WARM_UP_STEPS,
    message=f"Expected delays of at most {_WARM_UP_STEPS} steps.",
)
cluster_flags.expect_numbers(_BATCH_SIZES, 1)
flags.register_validator(
    "networks",
    lambda names: (
        names and all(re.fullmatch("loopback|[1-9][0-9]{0,4}[mg]bit", n) for n in names)
    ),
    message="Expected loopback or rates such as 100mbit and 1gbit.",
)


class Side(NamedTuple):
    """One way to train.

    Attributes:
        name: "psops", "barrier", "ssgd" or "local".
        sync_every: The interval of psops and barrier.
        delay: The delay of psops.
    """

    name: str
    sync_every: int | None = None
    delay: int | None = None


def _mbit(network):
    """Returns the megabits a second that a network is to let through, or `None`."""
    if network == "loopback":
        return None
    return int(network[:-4]) * {"m": 1, "g": 1000}[network[-4]]


def available(networks):
    """Returns those networks that can be had here, and warns of the others."""
    limited = [network for network in networks if _mbit(network)]
    why_not = slow_network.obstacle() if limited else None
    if not why_not:
        return list(networks)
    logging.warning(
        "Skipped %s: a network of a chosen rate needs Linux, root's rights and "
        "iproute2. The attempt to set one up said: %s",
        " and ".join(limited),
        why_not,
    )
    return [network for network in networks if network not in limited]


@contextlib.contextmanager
def cluster(num_workers, network, batch_size, sides):
    """Starts workers that train.

    Args:
        num_workers: W, at least 2.
        network: "loopback", or a rate such as "100mbit".
        batch_size: Examples per worker and step.
        sides: A list of `Side`s.

    Yields:
        The megabits a second that went from one worker to another when nothing else
        did, and a function of a side and a number of steps. That trains, and returns
        the seconds of each worker, and the bytes that each sent, `None` on loopback.
        It raises a `RuntimeError` if a worker fails, and a `TimeoutError` if one is
        late.
    """
    mbit = _mbit(network)
    with contextlib.ExitStack() as stack:
        workers = processes.Processes(
            _Worker, [(i, num_workers, mbit) for i in range(num_workers)]
        )
        stack.callback(workers.kill)
        workers.receive()
        if mbit:
            stack.enter_context(slow_network.switch(workers.pids))
        addresses = workers.ask("join")
        measured_mbit = workers.ask("receive_or_send", addresses)[0]
        workers.ask("make_sides", addresses, sides, batch_size)

        def train(side, steps):
            return tuple(zip(*workers.ask("train", side, steps)))

        yield measured_mbit, train


class _Worker:
    """A worker's process. Its methods are what it can be asked."""

    def __init__(self, barrier, rank, num_workers, mbit):
        self._barrier, self._rank, self._mbit = barrier, rank, mbit
        processors = sorted(os.sched_getaffinity(0))
        if share := len(processors) // num_workers:
            os.sched_setaffinity(0, processors[rank * share : (rank + 1) * share])
        if mbit:
            slow_network.leave()

    def __call__(self, name, *args):
        return getattr(self, name)(*args)

    def join(self):
        """Returns its address, at which it listens."""
        host = "127.0.0.1"
        if self._mbit:
            host = slow_network.join(self._rank, self._mbit)
        self._listener = socket.create_server((host, 0))
        self._listener.settimeout(processes.SECONDS)
        return "{}:{}".format(*self._listener.getsockname())

    def receive_or_send(self, addresses):
        """Sends for a while if it is the second worker.

        Returns:
            The megabits a second that came in, if it is the first worker.
        """
        if self._rank == 0:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(processes.SECONDS)
                start, size = time.perf_counter(), 0
                while chunk := connection.recv(2**20):
                    size += len(chunk)
                return 8e-6 * size / (time.perf_counter() - start)
        if self._rank == 1:
            host, port = addresses[0].split(":")
            place = host, int(port)
            with socket.create_connection(place, processes.SECONDS) as connection:
                deadline = time.perf_counter() + _PROBE_SECONDS
                while time.perf_counter() < deadline:
                    connection.sendall(bytes(2**16))
        return None

    def make_sides(self, addresses, sides, batch_size):
        self._listener.close()  # TensorFlow takes the port.
        # TensorFlow must not load before the process is where it stays.
        from benchmarks import training_sides

        self._sides = training_sides.make(
            self._rank, addresses, sides, batch_size, self._barrier.wait
        )

    def train(self, side, steps):
        """Returns the seconds that it took, and the bytes that were sent."""
        marks = []

        def mark():
            if not marks:
                self._barrier.wait()
            sent = slow_network.bytes_sent() if self._mbit else None
            marks.append((time.perf_counter(), sent))

        self._sides[side](_WARM_UP_STEPS, steps, mark)
        (start, before), (end, after) = marks
        return end - start, after - before if self._mbit else None


def measure(
    num_workers,
    network="loopback",
    sync_every=(1, 10, 50),
    batch_size=32,
    steps=100,
    repeats=9,
    delays=(0,),
):
    """Measures the samples per second of each side.

    Args:
        num_workers: The number of workers, at least 2.
        network: "loopback", or a rate such as "100mbit". Defaults to "loopback".
        sync_every: The intervals of psops and barrier. Defaults to 1, 10 and 50.
        batch_size: Examples per worker and step. Defaults to 32.
        steps: Steps in each timed run, or somewhat more, for whole intervals.
            Defaults to 100.
        repeats: Timed runs of each side, alternating. Defaults to 9.
        delays: The delays of psops, at most 10 steps, of which those below the
            interval count. Defaults to 0 only.

    Returns:
        A list of dicts, one for each side: "side", "workers", "batch_size",
        "sync_every" and "delay" as in `Side`, "network", "measured_mbit",
        "samples_per_second" (the median of those of the whole swarm),
        "min_samples_per_second", "max_samples_per_second", "to_local" and "to_ssgd"
        (median ratios), and "bytes_per_step", sent by each worker (`None` on
        loopback).
    """
    # Neighbours have a goal together: other work on the machine is to hit both.
    sides = [Side("ssgd")]
    for n in sync_every:
        sides += [Side("psops", n, delay) for delay in delays if delay < n]
        sides.append(Side("barrier", n))
    sides.append(Side("local"))
    rates, sizes = {side: [] for side in sides}, {side: [] for side in sides}
    with cluster(num_workers, network, batch_size, sides) as (measured_mbit, train):
        for repeat in range(repeats + 1):
            for side in sides:
                length = _num_steps(side, steps)
                seconds, sent = train(side, length)
                if repeat:  # The first round traces.
                    samples = num_workers * batch_size * length
                    rates[side].append(samples / max(seconds))
                    if _mbit(network):
                        sizes[side].append(sum(sent) / num_workers / length)
    return [
        {
            "side": side.name,
            "workers": num_workers,
            "batch_size": batch_size,
            "sync_every": side.sync_every,
            "delay": side.delay,
            "network": network,
            "measured_mbit": measured_mbit,
            "samples_per_second": statistics.median(rates[side]),
            "min_samples_per_second": min(rates[side]),
            "max_samples_per_second": max(rates[side]),
            **{
                f"to_{rival}": statistics.median(
                    a / b for a, b in zip(rates[side], rates[Side(rival)])
                )
                for rival in _RIVALS
            },
            "bytes_per_step": statistics.median(sizes[side]) if sizes[side] else None,
        }
        for side in sides
    ]


def _num_steps(side, steps):
    if side.name == "ssgd" or side.sync_every == 1:
        return -(-steps // 4)
    interval = side.sync_every or 1
    return -(-steps // interval) * interval


def table(records):
    """Returns the text for the records of one `measure`, with ratios and goals."""
    workers, network = records[0]["workers"], records[0]["network"]
    lines = [
        f"{workers} workers, {records[0]['batch_size']} samples each a step, "
        f"{network} ({records[0]['measured_mbit']:.1f} Mbit/s "
        "measured): samples per second of all workers",
        f"{'side':7} {'every':>5} {'delay':>5}"
        f" {'median':>8} {'lowest':>8} {'highest':>8}"
        f" {'KB a step':>10}" + "".join(f"{'/ ' + rival:>19}" for rival in _RIVALS),
    ]
    for record in records:
        sync_every, size = record["sync_every"], record["bytes_per_step"]
        delay = "" if record["delay"] is None else record["delay"]
        line = f"{record['side']:7} {sync_every or '':5} {delay:5}" + "".join(
            f" {record[prefix + 'samples_per_second']:8.0f}"
            for prefix in ("", "min_", "max_")
        )
        line += f" {'' if size is None else f'{size / 1000:.1f}':>10}"
        for rival in _RIVALS:
            goal = _GOALS.get((record["side"], sync_every, workers, network, rival))
            ratio = f"{record[f'to_{rival}']:.3f}"
            line += f"{ratio + (f' (goal {goal})' if goal else ''):>19}"
        lines.append(line)
    return "\n".join(lines)


def main(argv):
    """Prints a table for each number of workers and network, and writes the records."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Expected flags only.")
    settings = itertools.product(
        available(_NETWORKS.value), cluster_flags.WORKERS.value, _BATCH_SIZES.value
    )
    intervals = [int(interval) for interval in _SYNC_INTERVALS.value]
    delays = [int(delay) for delay in _DELAYS.value]
    rest = _STEPS.value, common_flags.REPEATS.value, delays
    cluster_flags.show(
        table,
        (
            measure(int(workers), network, intervals, int(batch_size), *rest)
            for network, workers, batch_size in settings
        ),
    )


if __name__ == "__main__":
    app.run(main)
