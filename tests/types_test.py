"""Tests of the type hints of the public names, by mypy."""

import inspect
import pathlib
import re
import tempfile

from absl.testing import absltest, parameterized
from mypy import api

import tf_psops
from tf_psops import cluster, heartbeat, launch

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_FUNCTIONS = (cluster.read_tf_config, heartbeat.beat, launch.launch)

_PROGRAM = """
import keras
import tensorflow as tf

import tf_psops
from tf_psops import cluster, heartbeat, launch


class HalfWay(tf_psops.Rule):
    exchange = "mean"

    def move(
        self, state: None, position: tf.Tensor, news: tf_psops.News, tensor_ids: object
    ) -> tuple[None, tf.Tensor]:
        heartbeat.beat()
        return state, 0.5 * (position + news.vector)


strategy = tf_psops.SwarmStrategy.in_process(4, startup_timeout=10)
with strategy.scope() as scope:
    scope.num_workers + 1
tls = tf_psops.TLS("me.pem", "me.key", authority="ca.pem")
strategy = tf_psops.SwarmStrategy(["GPU:0"], min_workers=2, tls=tls, particle="worker")
sync = tf_psops.PSOSync(10, HalfWay(), optimizer_slots="rescale", backup_dir="backups")
callbacks: list[keras.callbacks.Callback] = [sync]
shares: list[float] = [record["waiting_seconds"] for record in sync.log]
found = cluster.read_tf_config()
if found is not None and found.is_chief:
    launch.launch(["python", "train.py"], num_workers=4, max_restarts=3)
"""
# Each is wrong by itself, with mypy's name for what is wrong.
_MISTAKES = {
    'tf_psops.PSOSync("10")': "arg-type",
    "tf_psops.PSOSync()": "call-arg",
    "tf_psops.PSOSync(10, every=3)": "call-arg",
    "tf_psops.PSOSync(10, tf_psops.CentroidSwarm)": "arg-type",
    'tf_psops.PSOSync(10, non_trainable="mean")': "arg-type",
    'tf_psops.PSOSync(10, payload_dtype="int8")': "arg-type",
    'tf_psops.PSOSync(10).log["loss"]': "call-overload",
    "tf_psops.PSOSync(10).members.append(1)": "attr-defined",
    "tf_psops.SwarmStrategy(workers=4)": "call-arg",
    'tf_psops.SwarmStrategy(particle="machine")': "arg-type",
    'tf_psops.SwarmStrategy(tls="me.pem")': "arg-type",
    'tf_psops.SwarmStrategy.in_process("4")': "arg-type",
    'tf_psops.SwarmStrategy().num_workers + "4"': "operator",
    'tf_psops.CentroidSwarm("0.3")': "arg-type",
    "tf_psops.DiLoCo(rate=0.3)": "call-arg",
    'tf_psops.ParticleSwarm(take="best")': "arg-type",
    'tf_psops.TLS("me.pem")': "call-arg",
    "cluster.read_tf_config().is_chief": "union-attr",
    "heartbeat.beat(1)": "call-arg",
    'launch.launch(["python"])': "call-arg",
    'launch.launch(["python"], num_workers="4")': "arg-type",
    "tf_psops.Swarm": "attr-defined",
}


def _mypy(*arguments):
    """Returns what mypy has to say, by the project's settings and without a cache."""
    output, problems, _ = api.run(
        [f"--config-file={_ROOT / 'pyproject.toml'}", "--cache-dir=/dev/null"]
        + list(arguments)
    )
    return problems + output


def _check_program(text):
    """Returns mypy's errors in a program, as (line number, name)."""
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / "program.py"
        program.write_text(text, encoding="utf-8")
        said = _mypy(str(program))
    found = re.findall(r"^.*program\.py:(\d+): error: .*\[(.*)\]$", said, re.MULTILINE)
    if not found and "Success" not in said:
        raise AssertionError(said)
    return [(int(line), name) for line, name in found]


class MypyTest(absltest.TestCase):
    def test_package(self):
        self.assertStartsWith(_mypy(), "Success")

    def test_typed_program(self):
        self.assertEqual(_check_program(_PROGRAM), [])

    def test_mistakes(self):
        first = _PROGRAM.count("\n") + 1
        found = _check_program(_PROGRAM + "\n".join(_MISTAKES))
        self.assertEqual(found, list(enumerate(_MISTAKES.values(), first)))

    def test_mistakes_in_a_rule(self):
        program = _PROGRAM.replace('"mean"', '"all"').replace("tuple[None,", "list[")
        names = [name for _, name in _check_program(program)]
        self.assertEqual(names[:2], ["assignment", "override"])


class HintsTest(parameterized.TestCase):
    @parameterized.parameters(*tf_psops._HOMES)
    def test_class(self, name):
        public = getattr(tf_psops, name)
        for method, function in vars(public).items():
            # Keras has no type hints of what `PSOSync.on_train_begin` and such take.
            overrides = any(hasattr(base, method) for base in public.__mro__[1:])
            if isinstance(function, property):
                function = function.fget
            function = inspect.unwrap(getattr(function, "__func__", function))
            if not inspect.isfunction(function) or function.__module__ != (
                public.__module__
            ):
                continue
            if method == "__init__" or not (method.startswith("_") or overrides):
                self._check(function)

    @parameterized.parameters(*_FUNCTIONS)
    def test_function(self, function):
        self._check(function)

    def _check(self, function):
        signature = inspect.signature(function)
        untyped = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.annotation is parameter.empty and name not in ("self", "cls")
        ]
        if signature.return_annotation is signature.empty:
            untyped += ["return"] * (function.__name__ != "__init__")
        self.assertEqual(untyped, [], function.__qualname__)


if __name__ == "__main__":
    absltest.main()
