"""The `TF_CONFIG` of each worker of a cluster on this machine."""

import contextlib
import json
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def reserve(num_workers: int) -> Iterator[list[str]]:
    """Yields the values of `TF_CONFIG`, with loopback ports that stay the workers' own.

    A port that is bound with SO_REUSEADDR, but not listened at, is given to no one who
    does not ask for it by number: neither to another program that wants any free port,
    nor as the near end of a connection, such as of a worker that looks for another one.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num_workers)]
        for reserved in sockets:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(("127.0.0.1", 0))
        addresses = [f"127.0.0.1:{reserved.getsockname()[1]}" for reserved in sockets]
        yield [
            json.dumps(
                {
                    "cluster": {"worker": addresses},
                    "task": {"type": "worker", "index": index},
                }
            )
            for index in range(num_workers)
        ]
