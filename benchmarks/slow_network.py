"""A network of a chosen rate between processes of this machine, kept by the kernel.

Each process leaves the machine's network for one of its own, with a cable to a switch,
which a further process holds, and with a token bucket on its way out. The kernel takes
all of it away with the processes, however they end. It needs Linux, the rights of root,
and iproute2.
"""

import contextlib
import ctypes
import os
import pathlib
import subprocess

from benchmarks import processes

_CLONE_NEWNET = 0x40000000
_TRIAL = (
    "ip link add switch type bridge && ip link add port type veth peer name cable && "
    "tc qdisc add dev cable root tbf rate 1mbit burst 16kb latency 50ms"
)
_TRIAL_SECONDS = 30


def obstacle():
    """Returns why there cannot be such a network here, or `None` if there can."""
    command = ["unshare", "--net", "sh", "-c", _TRIAL]
    try:
        subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=_TRIAL_SECONDS
        )
    except subprocess.CalledProcessError as error:
        return error.stderr.strip() or str(error)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None


def leave():
    """Leaves the machine's network, for one of this process without any cable."""
    # `os.unshare` is there from Python 3.12 on only.
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"unshare(CLONE_NEWNET): {os.strerror(code)}")


@contextlib.contextmanager
def switch(pids):
    """Gives a cable of one switch to each of some processes, until the block is left.

    Args:
        pids: Ids of processes that have left the machine's network.
    """
    holder = processes.Processes(_make_switch, [()])
    try:
        holder.receive()
        holder.ask(pids)
        yield
    finally:
        holder.kill()


def _make_switch(barrier):
    leave()
    _run("ip link add switch type bridge")
    _run("ip link set switch up")
    return _wire


def _wire(pids):
    for port, pid in enumerate(pids):
        _run(f"ip link add port{port} type veth peer name cable netns {pid}")
        _run(f"ip link set port{port} master switch up")


def join(rank, mbit):
    """Joins the network with the cable that this process has got.

    Args:
        rank: The process' place among all, from 0.
        mbit: Megabits that it may send in a second.

    Returns:
        Its address, a string.
    """
    address = f"10.0.0.{rank + 1}"
    # What may leave at once: half a millisecond's worth, but some full packets.
    burst = max(62 * mbit, 16_000)
    _run("ip link set lo up")
    _run(f"ip address add {address}/24 dev cable")
    _run(f"tc qdisc add dev cable root tbf rate {mbit}mbit burst {burst} latency 50ms")
    _run("ip link set cable up")
    return address


def bytes_sent():
    """Returns how many bytes have left this process' network by its cable."""
    for line in pathlib.Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.strip().partition(":")
        if name == "cable":
            return int(counters.split()[8])
    raise OSError("This process has no cable. Call `join` first.")


def _run(command):
    subprocess.run(command.split(), check=True, timeout=processes.SECONDS)
