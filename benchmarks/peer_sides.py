"""The sides of `benchmarks.sync_step` to hold a swarm against: PyTorch, bare TCP.

PyTorch communicates by gloo, and computes in one thread for each worker, as under
`torchrun`.
"""

import datetime
import os
import warnings
from concurrent import futures

import numpy as np

try:
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms.model_averaging import averagers
except ImportError:
    pass  # "tcp" does without.


def make(names, shapes, links):
    """Makes this worker's part of some sides.

    Args:
        names: Names of the sides: "gloo_averager", "gloo_broadcast", "tcp".
        shapes: The shapes of the weights.
        links: A `benchmarks.sync_step.Links`.

    Returns:
        A dict of each name to its side; see `benchmarks.swarm_sides.make`.
    """
    sides = {}
    if "tcp" in names:
        sides["tcp"] = _Tcp(shapes, links)
    if set(names) <= {"tcp"}:
        return sides
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{links.addresses[0]}",
        rank=links.rank,
        world_size=len(links.addresses),
        timeout=datetime.timedelta(seconds=links.timeout),
    )
    module = torch.nn.ParameterList(torch.zeros(shape) for shape in shapes)
    for name, side in (("gloo_averager", _Averager), ("gloo_broadcast", _Broadcast)):
        if name in names:
            sides[name] = side(module)
    return sides


class _Torch:
    def __init__(self, module):
        self._module = module
        self._loss = None

    def prepare(self, value, loss):
        self._loss = torch.tensor([loss])
        for parameter in self._module.parameters():
            parameter.data.fill_(value)

    def weights(self):
        return (p.detach().numpy() for p in self._module.parameters())


class _Averager(_Torch):
    """The mean of all workers' parameters, as PyTorch's own local SGD takes it."""

    def __init__(self, module):
        super().__init__(module)
        warnings.filterwarnings("ignore", "When period is 1")
        self._averager = averagers.PeriodicModelAverager(period=1, warmup_steps=0)
        # Parameters without a gradient would be left out.
        for parameter in module.parameters():
            parameter.grad = torch.zeros(1).expand_as(parameter)

    def sync(self):
        self._averager.average_parameters(self._module.parameters())


class _Broadcast(_Torch):
    """The parameters of the worker with the lowest loss."""

    def sync(self):
        losses = [torch.empty(1) for _ in range(dist.get_world_size())]
        dist.all_gather(losses, self._loss)
        parameters = [p.detach() for p in self._module.parameters()]
        vector = torch.cat([parameter.reshape(-1) for parameter in parameters])
        dist.broadcast(vector, src=int(torch.cat(losses).argmin()))
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, vector.split(sizes)):
            parameter.copy_(part.view_as(parameter))


class _Tcp:
    """The bare bytes from the first worker to each of the others."""

    def __init__(self, shapes, links):
        self._vector = np.zeros(sum(map(np.prod, shapes)), np.float32)
        self._sockets = links.sockets
        self._transfer = self._receive if links.rank else self._send
        self._threads = futures.ThreadPoolExecutor(len(links.sockets))
        for link in links.sockets:
            link.settimeout(links.timeout)

    def prepare(self, value, loss):
        self._vector.fill(value)

    def sync(self):
        list(self._threads.map(self._transfer, self._sockets))

    def weights(self):
        return [self._vector]

    def _send(self, link):
        link.sendall(self._vector.data.cast("B"))

    def _receive(self, link):
        rest = self._vector.data.cast("B")
        while rest:
            count = link.recv_into(rest)
            if not count:
                raise ConnectionError("The first worker has gone.")
            rest = rest[count:]
