"""How two workers prove to each other that they are of one swarm, and say who they are.

Each challenges the other with a random number and answers the other's with an HMAC of
both under the shared secret, which itself does not travel (RFC 2104; ISO/IEC 9798-4).
All that follows is authenticated with a key made of the secret and both numbers. Of
what a stranger sends, a challenge and an answer of fixed length are read, no more.

Without a secret the proof only tells workers of tf_psops from other programs.
"""

import hmac
import json
import os
import pathlib
import secrets
import struct

_MAGIC = b"tf_psops-swarm-1"
_CHALLENGE_BYTES = 32
_TAG_BYTES = 32
_LENGTH = struct.Struct("!I")
_LARGEST = 1 << 20  # Bytes of what a worker says of itself.


class StrangerError(ConnectionError):
    """The other end of a connection has not proved that it is of the swarm."""


def read_secret(environ=os.environ):
    """Returns the swarm's shared secret, bytes; `b""` without one.

    It is the text in `TF_PSOPS_SECRET`, or in the file that `TF_PSOPS_SECRET_FILE`
    names, without white space around it.

    Raises:
        ValueError: If the file cannot be read or is empty.
    """
    text = environ.get("TF_PSOPS_SECRET", "").strip()
    path = environ.get("TF_PSOPS_SECRET_FILE", "")
    if text or not path:
        return text.encode()
    try:
        secret = pathlib.Path(path).read_bytes().strip()
    except OSError as error:
        raise ValueError(
            f"TF_PSOPS_SECRET_FILE names a file that cannot be read: {error}. Give "
            "every worker a file with the same secret, or leave the variable out."
        ) from error
    if not secret:
        raise ValueError(
            f"TF_PSOPS_SECRET_FILE names an empty file. Received: {path!r}. Write a "
            "secret into it, the same for every worker."
        )
    return secret


def call(connection, secret, hello):
    """Introduces this worker to the one that it has called.

    Args:
        connection: A connected socket with a time-out.
        secret: The swarm's secret, bytes.
        hello: What this worker says of itself, of types that JSON knows.

    Returns:
        What the other one answers.

    Raises:
        StrangerError: If the other one does not know the secret.
        OSError: If the connection breaks, or is silent for too long.
    """
    mine = secrets.token_bytes(_CHALLENGE_BYTES)
    connection.sendall(_MAGIC + mine)
    theirs = _read_challenge(connection)
    key = _tag(secret, mine + theirs)
    if not hmac.compare_digest(_read(connection, _TAG_BYTES), _tag(key, b"called")):
        raise StrangerError
    connection.sendall(_tag(key, b"caller"))
    _send(connection, key, b"hello", hello)
    return _receive(connection, key, b"answer")


def answer(connection, secret, reply):
    """Lets a caller introduce itself, and answers.

    Args:
        connection: A connected socket with a time-out.
        secret: The swarm's secret, bytes.
        reply: A function of what the caller says that returns the answer.

    Raises:
        StrangerError: If the caller does not know the secret.
        OSError: If the connection breaks, or is silent for too long.
    """
    theirs = _read_challenge(connection)
    mine = secrets.token_bytes(_CHALLENGE_BYTES)
    key = _tag(secret, theirs + mine)
    connection.sendall(_MAGIC + mine + _tag(key, b"called"))
    if not hmac.compare_digest(_read(connection, _TAG_BYTES), _tag(key, b"caller")):
        raise StrangerError
    hello = _receive(connection, key, b"hello")
    _send(connection, key, b"answer", reply(hello))


def _read_challenge(connection):
    if _read(connection, len(_MAGIC)) != _MAGIC:
        raise StrangerError
    return _read(connection, _CHALLENGE_BYTES)


def _send(connection, key, role, value):
    text = json.dumps(value).encode()
    connection.sendall(_LENGTH.pack(len(text)) + _tag(key, role + text) + text)


def _receive(connection, key, role):
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    if length > _LARGEST:
        raise StrangerError
    tag = _read(connection, _TAG_BYTES)
    text = _read(connection, length)
    if not hmac.compare_digest(tag, _tag(key, role + text)):
        raise StrangerError
    return json.loads(text)


def _read(connection, count):
    """Returns exactly so many bytes, however the network has cut them."""
    got = b""
    while len(got) < count:
        piece = connection.recv(count - len(got))
        if not piece:
            raise ConnectionError("The other end has closed the connection.")
        got += piece
    return got


def _tag(key, message):
    return hmac.digest(key, message, "sha256")
