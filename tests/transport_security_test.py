"""Tests of who may join a swarm, and of what listens where: real processes."""

import contextlib
import os
import pathlib
import re
import socket
import tempfile

import clusters
import keras
import numpy as np
import tensorflow as tf
import trustme
from absl.testing import absltest

import tf_psops

_X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")


def _train(strategy, callbacks=()):
    keras.utils.set_random_seed(1)
    with strategy.scope():
        model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.1), "mse")
    sync = tf_psops.PSOSync(2)
    kwargs = {"batch_size": 4, "verbose": 0, "callbacks": [*callbacks, sync]}
    model.fit(_X, _X[:, :1], **kwargs)
    return np.concatenate([w.ravel() for w in model.get_weights()]).tolist()


def _listening(pid):
    """Returns the addresses at which a process listens, as the system tells."""
    inodes = set()
    for path in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # That of this listing.
            if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(path)):
                inodes.add(match[1])
    found = set()
    for name in ("tcp", "tcp6"):
        for line in (
            pathlib.Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
        ):
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host, port = fields[1].split(":")
                found.add((host, int(port, 16)))
    return found


class _Listen(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def on_train_batch_end(self, batch, logs=None):
        self.seen |= _listening(os.getpid())


def _listen():
    listen = _Listen()
    _train(tf_psops.SwarmStrategy(), [listen])
    address = tf_psops.cluster.read_tf_config()
    return sorted(listen.seen), address.workers[address.index]


def _train_beside_mirrored():
    swarm = tf_psops.SwarmStrategy()
    cpu = tf.distribute.MirroredStrategy(["CPU:0"])
    losses = []
    for strategy in (swarm, cpu, swarm, cpu):
        with strategy.scope():
            model = keras.Sequential([keras.Input([4]), keras.layers.Dense(1)])
            model.compile("sgd", "mse")
        callbacks = [tf_psops.PSOSync(2)] if strategy is swarm else []
        history = model.fit(
            _X, _X[:, :1], batch_size=8, verbose=0, callbacks=callbacks
        ).history
        losses.append(history["loss"][0])
    return losses


def _train_with(environment, kwargs):
    os.environ.update(environment)
    index = tf_psops.cluster.read_tf_config().index
    tls = kwargs and tf_psops.TLS(*[path.format(index=index) for path in kwargs])
    return _train(tf_psops.SwarmStrategy(startup_timeout=40, tls=tls or None))


def _train_or_say(secrets):
    index = tf_psops.cluster.read_tf_config().index
    os.environ["TF_PSOPS_SECRET"] = secrets[index]
    try:
        return _train(tf_psops.SwarmStrategy(startup_timeout=30))
    except (ValueError, TimeoutError) as error:
        return str(error)


class SecurityTest(absltest.TestCase):
    def test_only_the_addresses_of_tf_config_listen(self):
        for seen, address in clusters.run(_listen, 2):
            host, port = address.split(":")
            packed = socket.inet_aton(host)[::-1].hex().upper()
            self.assertEqual(seen, [(packed, int(port))])

    def test_mirrored_strategy_in_turns(self):
        first, second = clusters.run(_train_beside_mirrored, 2, timeout=120)
        self.assertTrue(np.isfinite(first + second).all())

    def test_tls_and_secret(self):
        folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        authority = trustme.CA()
        authority.cert_pem.write_to_path(folder / "ca.pem")
        for index in range(2):
            own = authority.issue_cert("127.0.0.1")
            own.cert_chain_pems[0].write_to_path(folder / f"{index}.pem")
            own.private_key_pem.write_to_path(folder / f"{index}.key")
        (folder / "secret").write_text("a secret\n")
        paths = [
            f"{folder}/{{index}}.pem",
            f"{folder}/{{index}}.key",
            f"{folder}/ca.pem",
        ]
        secret = {"TF_PSOPS_SECRET_FILE": f"{folder}/secret"}
        encrypted = clusters.run(_train_with, 2, secret, paths)
        self.assertEqual(encrypted, clusters.run(_train_with, 2, {}, None))

    def test_another_secret_is_an_error_on_all(self):
        for text in clusters.run(_train_or_say, 2, ["one", "another"]):
            self.assertRegex(text, "another secret|nobody answers")

    def test_a_certificate_of_another_authority_is_not_let_in(self):
        folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        for index in range(2):
            authority = trustme.CA()
            own = authority.issue_cert("127.0.0.1")
            authority.cert_pem.write_to_path(folder / f"{index}-ca.pem")
            own.cert_chain_pems[0].write_to_path(folder / f"{index}.pem")
            own.private_key_pem.write_to_path(folder / f"{index}.key")
        paths = [f"{folder}/{{index}}{end}" for end in (".pem", ".key", "-ca.pem")]
        for text in clusters.run(_refused, 2, paths):
            self.assertRegex(text, "TimeoutError.*nobody answers")


def _refused(paths):
    index = tf_psops.cluster.read_tf_config().index
    tls = tf_psops.TLS(*[path.format(index=index) for path in paths])
    try:
        tf_psops.SwarmStrategy(startup_timeout=4, tls=tls)
    except TimeoutError as error:
        return f"TimeoutError: {error}"
    return "let in"


if __name__ == "__main__":
    absltest.main()
