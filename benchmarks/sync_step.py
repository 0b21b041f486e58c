r"""Measures what a synchronisation costs, against PyTorch and a naive design.

```bash
pip install -e '.[benchmark]'
python -m benchmarks.sync_step --params=1M,10M --workers=2,4 --output_json=sync.json
```

The weights of a network, in 60 tensors, are synchronised between real processes on
this machine. The sides take turns, round by round, and the workers of the others sleep
meanwhile:

  * psops: the whole synchronisation of `PSOSync` with its default rule;
    psops_broadcast: with `ParticleSwarm(take="global_best")`, where each time another
    particle has found a better best; psops_all_reduce: with `ParameterAverage`; each
    also with float16 on the wire, and with TLS.
  * ring_all_reduce: `ReplicaContext.all_reduce` of every variable under TensorFlow's
    `MultiWorkerMirroredStrategy`, whose ring goes over gRPC.
  * all_gather: `ReplicaContext.all_gather` of every variable under the same strategy,
    of which all take the best worker's.
  * gloo_averager: PyTorch's `PeriodicModelAverager`; gloo_broadcast: PyTorch's
    broadcast of the best worker's parameters as one vector. Both need PyTorch.
  * tcp: the bare bytes from one worker to all others.

In a round all workers of a side fill their weights with a value of their own, meet at
a barrier, and synchronise. Each takes its own time from there; the longest counts.
After each round all workers must hold the same weights.

All sides together take 6 GB in each worker at 25M parameters: choose fewer by `--sides`
where there is not so much.
"""

import collections
import contextlib
import importlib.util
import itertools
import math
import socket
import statistics
import tempfile
import time
from typing import NamedTuple

import trustme
from absl import app, flags, logging

from benchmarks import cluster_flags, common_flags, processes


# Imported by the workers only, so that each loads TensorFlow or PyTorch, not both.
def _make_swarm_sides(*args):
    from benchmarks import swarm_sides

    return swarm_sides.make(*args)


# Of workers of their own, as all connections of a strategy are encrypted or none.
def _make_encrypted_sides(*args):
    from benchmarks import swarm_sides

    return swarm_sides.make(*args, encrypted=True)


def _make_peer_sides(*args):
    from benchmarks import peer_sides

    return peer_sides.make(*args)


def _make_stock_sides(*args):
    from benchmarks import stock_sides

    return stock_sides.make(*args)


_SWARM_SIDES = ("psops", "psops_broadcast", "psops_all_reduce")
_ROUNDED_SIDES = tuple(f"{side}/float16" for side in _SWARM_SIDES)
_ENCRYPTED_SIDES = tuple(f"{side}/tls" for side in _SWARM_SIDES)
_FAMILIES = {
    _make_swarm_sides: (*_SWARM_SIDES, *_ROUNDED_SIDES),
    _make_encrypted_sides: _ENCRYPTED_SIDES,
    _make_stock_sides: ("ring_all_reduce", "all_gather"),
    _make_peer_sides: ("gloo_averager", "gloo_broadcast", "tcp"),
}
SIDES = tuple(itertools.chain(*_FAMILIES.values()))
_RIVALS = ("gloo_averager", "all_gather", "float32")

_NUM_TENSORS = 60
_SIDE_UNIT = 4  # As in most networks, layers have a whole number of vector registers.
_MIN_PARAMS = _NUM_TENSORS * _SIDE_UNIT**2
# TensorFlow's memory grows by doubling, and what it has never touched is slow.
_WARM_UP_ROUNDS = 8

# The largest ratio of a side to a rival, by millions of parameters and workers.
_SIZES = ((1, 2), (1, 4), (10, 2), (10, 4), (25, 2), (25, 4))
_GOALS = {
    ("psops_broadcast", "gloo_averager"): dict(zip(_SIZES, (3, 3, 1, 1.2, 1, 1.2))),
    ("psops_broadcast", "all_gather"): dict(
        zip(_SIZES, (0.1, 0.1, 0.3, 0.2, 0.3, 0.2))
    ),
    ("psops_all_reduce", "gloo_averager"): dict(zip(_SIZES[2:], (1.3, 1.5, 1.3, 1.5))),
    ("psops", "gloo_averager"): dict(zip(_SIZES[2:], (1.3, 1.5, 1.3, 1.5))),
    ("psops_broadcast", "float32"): dict.fromkeys(_SIZES[2:], 0.75),
}


_PARAMS = flags.DEFINE_list(
    "params", ["0.1M", "1M", "10M", "25M"], "Parameters of the network."
)
_SIDES = flags.DEFINE_list("sides", list(SIDES), f"Sides: {', '.join(SIDES)}.")


cluster_flags.expect_params(_PARAMS, _MIN_PARAMS)
flags.register_validator(
    "sides",
    lambda names: names and set(names) <= set(SIDES),
    message=f"Expected some of {SIDES}, separated by commas.",
)


class Links(NamedTuple):
    """How one worker reaches the others.

    Attributes:
        rank: Its place among the workers, from 0.
        addresses: "host:port" of each worker, free to listen on.
        sockets: Connected TCP sockets: the first worker's to each of the others, or
            another worker's to the first.
        timeout: Seconds after which a wait for another worker fails.
        certificates: Paths of its certificate, its key and the authority, as in
            `tf_psops.TLS`.
    """

    rank: int
    addresses: list[str]
    sockets: list[socket.socket]
    timeout: float
    certificates: tuple[str, str, str]


class Round(NamedTuple):
    """What came of one round.

    Attributes:
        seconds: What it took, a float.
        lowest: The lowest weight afterwards, the same on all workers.
        highest: The highest one.
    """

    seconds: float
    lowest: float
    highest: float


def available(sides):
    """Returns those sides that can run here, and warns of the others."""
    if importlib.util.find_spec("torch"):
        return list(sides)
    absent = [side for side in sides if side.startswith("gloo")]
    if absent:
        logging.warning(
            "Skipped %s: there is no PyTorch. Install it with "
            "`pip install -e '.[benchmark]'`.",
            " and ".join(absent),
        )
    return [side for side in sides if side not in absent]


@contextlib.contextmanager
def cluster(params, num_workers, sides):
    """Starts the workers of some sides.

    Args:
        params: The number of parameters; what runs is the nearest that 60 square
            matrices hold whose sides are multiples of 4.
        num_workers: W, the number of workers of each side, at least 2.
        sides: Some of `SIDES`.

    Yields:
        A function of a side and a number, from 0 and growing, that runs a round of
        this number and returns a `Round`. Worker i brings weights of i + 1, and
        worker number % W the lowest loss. It raises a `RuntimeError` if a worker
        fails or the workers do not agree, and a `TimeoutError` if one is late.
    """
    size = _SIDE_UNIT * round(math.sqrt(params / _MIN_PARAMS))
    shapes = [(size, size)] * _NUM_TENSORS
    with contextlib.ExitStack() as stack:
        certificates = _certificates(
            num_workers, stack.enter_context(tempfile.TemporaryDirectory())
        )
        families = {}
        for make, members in _FAMILIES.items():
            names = [side for side in sides if side in members]
            if names:
                links = _links(certificates)
                family = processes.Processes(
                    _serve, [(make, names, shapes, link) for link in links]
                )
                stack.callback(family.kill)
                for end in itertools.chain(*(link.sockets for link in links)):
                    end.close()
                families.update(dict.fromkeys(names, family))
        for family in set(families.values()):
            family.receive()

        def run(side, number):
            seconds, weights = zip(*families[side].ask(side, number))
            if len(set(weights)) > 1 or not all(map(math.isfinite, weights[0])):
                raise RuntimeError(
                    f"The workers of {side} do not agree after round {number}. "
                    "Expected the same finite weights. Received the lowest and the "
                    f"highest of each worker: {weights}."
                )
            return Round(max(seconds), *weights[0])

        yield run


def measure(params, num_workers, sides=SIDES, repeats=9):
    """Measures the milliseconds of a synchronisation of each side.

    Args:
        params: The number of parameters; see `cluster`.
        num_workers: The number of workers, at least 2.
        sides: Some of `SIDES`, which must be available. Defaults to all.
        repeats: Timed rounds of each side, alternating. Defaults to 9.

    Returns:
        A list of dicts, one for each side: "side", "params", "workers", "wire"
        (a type, or "tls"), "median_ms", "min_ms" and "max_ms".
    """
    times = collections.defaultdict(list)
    with cluster(params, num_workers, sides) as run:
        for number in range(_WARM_UP_ROUNDS + repeats):
            for side in sides:
                times[side].append(1e3 * run(side, number).seconds)
    return [
        {
            "side": side.partition("/")[0],
            "params": params,
            "workers": num_workers,
            "wire": side.partition("/")[2] or "float32",
            "median_ms": statistics.median(values[_WARM_UP_ROUNDS:]),
            "min_ms": min(values[_WARM_UP_ROUNDS:]),
            "max_ms": max(values[_WARM_UP_ROUNDS:]),
        }
        for side, values in times.items()
    ]


def table(records):
    """Returns the text for the records of one `measure`, with ratios and goals."""
    params, workers = records[0]["params"], records[0]["workers"]
    medians = {_name(record): record["median_ms"] for record in records}
    lines = [
        f"{params} parameters, {workers} workers: milliseconds of a synchronisation",
        f"{'side':24} {'median':>9} {'lowest':>9} {'highest':>9}"
        + "".join(f"{'/ ' + rival:>18}" for rival in _RIVALS),
    ]
    for record in records:
        line = f"{_name(record):24}" + "".join(
            f" {record[key]:9.2f}" for key in ("median_ms", "min_ms", "max_ms")
        )
        exact = record["wire"] == "float32"
        for rival in _RIVALS:
            # Of another wire only what it brings, or costs.
            other = record["side"] if rival == "float32" else rival
            if other not in medians or exact == (rival == "float32"):
                line += " " * 18
                continue
            ratio = f"{record['median_ms'] / medians[other]:.3f}"
            goals = {}
            if record["wire"] != "tls":
                goals = _GOALS.get((record["side"], rival), {})
            goal = goals.get((params / 10**6, workers))
            line += f"{ratio + (f' (goal {goal})' if goal else ''):>18}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _name(record):
    wire = record["wire"]
    return record["side"] + (f"/{wire}" if wire != "float32" else "")


def _certificates(num_workers, folder):
    """Writes a certificate of one authority for each worker, and returns the paths."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(f"{folder}/authority.pem")
    paths = []
    for rank in range(num_workers):
        certificate, key = f"{folder}/{rank}.pem", f"{folder}/{rank}.key"
        own = authority.issue_cert("127.0.0.1")
        own.cert_chain_pems[0].write_to_path(certificate)
        own.private_key_pem.write_to_path(key)
        paths.append((certificate, key, f"{folder}/authority.pem"))
    return paths


def _links(certificates):
    """Returns the `Links` of each worker, on loopback."""
    num_workers = len(certificates)
    with contextlib.ExitStack() as stack:
        # All stay open until the last is bound, so that no port comes twice.
        listeners = [
            stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            for _ in range(num_workers)
        ]
        places = [listener.getsockname() for listener in listeners]
        theirs = [socket.create_connection(places[0]) for _ in range(num_workers - 1)]
        first = [listeners[0].accept()[0] for _ in theirs]
    addresses = [f"{host}:{port}" for host, port in places]
    sockets = [first, *([other] for other in theirs)]
    return [
        Links(rank, addresses, sockets[rank], processes.SECONDS, own)
        for rank, own in enumerate(certificates)
    ]


def _serve(barrier, make, names, shapes, links):
    """Makes a worker's part of some sides, and returns what runs a round of one."""
    sides = make(names, shapes, links)
    return lambda name, number: _take_part(sides[name], number, barrier, links)


def _take_part(side, number, barrier, links):
    # The loss of a worker at its best, lower each time, and that of the others. The
    # swarm's own are off by up to 1.
    best = number % len(links.addresses) == links.rank
    side.prepare(float(links.rank + 1), -3.0 * (number + 1) if best else 3.0)
    barrier.wait()
    start = time.perf_counter()
    side.sync()
    seconds = time.perf_counter() - start
    lows, highs = zip(*((values.min(), values.max()) for values in side.weights()))
    return seconds, (float(min(lows)), float(max(highs)))


def main(argv):
    """Prints a table of medians and ratios for each size, and writes the records."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Expected flags only.")
    sides = available(_SIDES.value)
    if not sides:
        return
    sizes = itertools.product(_PARAMS.value, cluster_flags.WORKERS.value)
    cluster_flags.show(
        table,
        (
            measure(
                common_flags.count(params),
                int(workers),
                sides,
                common_flags.REPEATS.value,
            )
            for params, workers in sizes
        ),
    )


if __name__ == "__main__":
    app.run(main)
