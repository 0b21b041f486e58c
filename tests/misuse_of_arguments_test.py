"""A table of misused arguments, of the library, the launcher and `TF_CONFIG`."""

import json
import math
import os
from unittest import mock

import misuses
import numpy as np
import tensorflow as tf
from absl.testing import parameterized

import tf_psops
from tf_psops import cluster, launch


def _strategy(**kwargs):
    return tf_psops.SwarmStrategy(devices=["CPU:0"], **kwargs)


def _launch(command=("true",), num_workers=1, **kwargs):
    return launch.launch(command, num_workers, **kwargs)


def _tf_config(workers, index=0):
    config = {"cluster": {"worker": workers}, "task": {"type": "worker"}}
    config["task"]["index"] = index
    return cluster.read_tf_config({"TF_CONFIG": json.dumps(config)})


def _with_environment(**environ):
    with mock.patch.dict(os.environ, environ):
        tf_psops.SwarmStrategy()


def _of_backend(name):
    with mock.patch("keras.backend.backend", return_value=name):
        _strategy()


# Name: what is called, the error, and what its text says in this order.
_ARGUMENTS = {
    "devices_none": (
        lambda: tf_psops.SwarmStrategy(devices=[]),
        ValueError, "`devices`", "'GPU:0', 'GPU:1'", r"devices=\[\]",
    ),
    "backend": (
        lambda: _of_backend("torch"),
        ValueError, "'tensorflow'", "'torch'", "KERAS_BACKEND=tensorflow",
    ),
    "devices_text": (
        lambda: tf_psops.SwarmStrategy(devices="CPU:0"),
        ValueError, "`devices`", "a list of different local devices", "'CPU:0'",
    ),
    "devices_dict": (
        lambda: tf_psops.SwarmStrategy(devices={"CPU:0": 1}),
        ValueError, "`devices`", "a list of different local devices", "{'CPU:0': 1}",
    ),
    "devices_absent": (
        lambda: tf_psops.SwarmStrategy(devices=["CPU:99"]),
        ValueError, "`devices`", "out of .*'CPU:0'", r"\['CPU:99'\]",
    ),
    "devices_no_gpu": (
        lambda: tf_psops.SwarmStrategy(devices=["GPU:64"]),
        ValueError, "`devices`", "out of .*'CPU:0'", r"\['GPU:64'\]",
    ),
    "cluster_resolver": (
        lambda: _strategy(cluster_resolver="localhost:2222"),
        ValueError, "`cluster_resolver`", "ClusterResolver", "'localhost:2222'",
    ),
    "min_workers": (
        lambda: _strategy(min_workers=2),
        ValueError, "`min_workers`", "of the 1 workers", "min_workers=2",
    ),
    "tls": (
        lambda: _strategy(tls="cert.pem"),
        ValueError, "`tls`", "tf_psops.TLS", "'cert.pem'",
    ),
    "startup_timeout_0": (
        lambda: _strategy(startup_timeout=0),
        ValueError, "`startup_timeout`", "above 0", "startup_timeout=0",
    ),
    "startup_timeout_text": (
        lambda: _strategy(startup_timeout="5"),
        ValueError, "`startup_timeout`", "above 0", "startup_timeout='5'",
    ),
    "share_gradients": (
        lambda: _strategy(share_gradients="no"),
        ValueError, "`share_gradients`", "True or False", "'no'",
    ),
    "num_particles_0": (
        lambda: tf_psops.SwarmStrategy.in_process(0),
        ValueError, "`num_particles`", "at least 1", "num_particles=0",
    ),
    "num_particles_bool": (
        lambda: tf_psops.SwarmStrategy.in_process(True),
        ValueError, "`num_particles`", "at least 1", "num_particles=True",
    ),
    "num_particles_many": (
        lambda: tf_psops.SwarmStrategy.in_process(99),
        RuntimeError, "num_particles=99", "already initialised with", "before anything",
    ),
    "sync_every_0": (
        lambda: tf_psops.PSOSync(0),
        ValueError, "`sync_every`", "at least 1", "sync_every=0",
    ),
    "sync_every_negative": (
        lambda: tf_psops.PSOSync(-3),
        ValueError, "`sync_every`", "at least 1", "sync_every=-3",
    ),
    "sync_every_float": (
        lambda: tf_psops.PSOSync(np.float32(3)),
        ValueError, "`sync_every`", "at least 1", r"sync_every=.*3\.0",
    ),
    "sync_every_bool": (
        lambda: tf_psops.PSOSync(np.bool_(True)),
        ValueError, "`sync_every`", "at least 1", "sync_every=.*True",
    ),
    "sync_every_nan": (
        lambda: tf_psops.PSOSync(math.nan),
        ValueError, "`sync_every`", "at least 1", "sync_every=nan",
    ),
    "rule_class": (
        lambda: tf_psops.PSOSync(1, tf_psops.ParticleSwarm),
        ValueError, "`rule`", r"such as tf_psops.CentroidSwarm\(\)", "rule=<class",
    ),
    "rule_name": (
        lambda: tf_psops.PSOSync(1, "pso"),
        ValueError, "`rule`", r"such as tf_psops.CentroidSwarm\(\)", "rule='pso'",
    ),
    "non_trainable_arrays": (
        lambda: tf_psops.PSOSync(1, non_trainable=np.array(["local", "local"])),
        ValueError, "`non_trainable`", "'average' or 'local'", r"array\(\['local'",
    ),
    "optimizer_slots": (
        lambda: tf_psops.PSOSync(1, optimizer_slots=None),
        ValueError, "`optimizer_slots`", "'average', 'local' or 'rescale'", "=None",
    ),
    "payload_dtype": (
        lambda: tf_psops.PSOSync(1, payload_dtype="float64"),
        ValueError, "`payload_dtype`", "'float16', 'bfloat16' or None", "'float64'",
    ),
    "centroid_inertia_negative": (
        lambda: tf_psops.CentroidSwarm(inertia=-0.1),
        ValueError, "`inertia`", "from 0 to below 1", "inertia=-0.1",
    ),
    "centroid_inertia_tuple": (
        lambda: tf_psops.CentroidSwarm(inertia=(0.3, 0.5)),
        ValueError, "`inertia`", "from 0 to below 1", r"inertia=\(0.3, 0.5\)",
    ),
    "centroid_inertia_bool": (
        lambda: tf_psops.CentroidSwarm(inertia=True),
        ValueError, "`inertia`", "from 0 to below 1", "inertia=True",
    ),
    "particle_inertia_negative": (
        lambda: tf_psops.ParticleSwarm(inertia=-0.3),
        ValueError, "`inertia`", "from 0 to below 1", "inertia=-0.3",
    ),
    "particle_cognitive": (
        lambda: tf_psops.ParticleSwarm(cognitive=float("inf")),
        ValueError, "`cognitive`", "finite number of at least 0", "cognitive=inf",
    ),
    "particle_social": (
        lambda: tf_psops.ParticleSwarm(social="0.5"),
        ValueError, "`social`", "finite number of at least 0", "social='0.5'",
    ),
    "particle_take": (
        lambda: tf_psops.ParticleSwarm(take="best"),
        ValueError, "`take`", "'own' or 'global_best'", "take='best'",
    ),
    "particle_seed": (
        lambda: tf_psops.ParticleSwarm(seed=1.5),
        ValueError, "`seed`", "a whole number", "seed=1.5",
    ),
    "average_argument": (
        lambda: tf_psops.ParameterAverage(0.5),
        TypeError, r"ParameterAverage\(\) takes no arguments",
    ),
    "elastic_beta": (
        lambda: tf_psops.ElasticAverage(beta=0),
        ValueError, "`beta`", "above 0 and at most 1", "beta=0",
    ),
    "slow_inertia": (
        lambda: tf_psops.SlowMomentum(inertia=1),
        ValueError, "`inertia`", "from 0 to below 1", "inertia=1",
    ),
    "diloco_learning_rate": (
        lambda: tf_psops.DiLoCo(learning_rate=0),
        ValueError, "`learning_rate`", "above 0", "learning_rate=0",
    ),
    "diloco_momentum": (
        lambda: tf_psops.DiLoCo(momentum=1),
        ValueError, "`momentum`", "from 0 to below 1", "momentum=1",
    ),
    "launch_text": (
        lambda: _launch("python train.py"),
        ValueError, "`command`", "'python train.py'", "each argument apart",
    ),
    "launch_number": (
        lambda: _launch(["sleep", 5]),
        ValueError, "`command`", r"\['sleep', 5\]", "each argument apart",
    ),
    "launch_num_workers_0": (
        lambda: _launch(num_workers=0),
        ValueError, "`num_workers`", "at least 1", "Received: 0", "Pass",
    ),
    "launch_num_workers_float": (
        lambda: _launch(num_workers=2.0),
        ValueError, "`num_workers`", "at least 1", "Received: 2.0", "a whole number",
    ),
    "launch_num_workers_none": (
        lambda: _launch(num_workers=None),
        ValueError, "`num_workers`", "at least 1", "Received: None", "a whole number",
    ),
    "launch_grace_seconds": (
        lambda: _launch(grace_seconds=-1),
        ValueError, "`grace_seconds`", "at least 0", "Received: -1", "Pass",
    ),
    "launch_stall_timeout": (
        lambda: _launch(stall_timeout=math.nan),
        ValueError, "`stall_timeout`", "at least 0", "Received: nan", "Pass",
    ),
    "launch_max_restarts": (
        lambda: _launch(max_restarts=1.5),
        ValueError, "`max_restarts`", "at least 0", "Received: 1.5", "a whole number",
    ),
    "launch_min_workers": (
        lambda: _launch(num_workers=2, min_workers=3),
        ValueError, "`min_workers`", "from 1 to num_workers=2", "Received: 3", "Pass",
    ),
    "launch_output": (
        lambda: _launch(output="log.txt"),
        ValueError, "`output`", "text stream", "'log.txt'", "Pass an open file",
    ),
    "environ": (
        lambda: cluster.read_tf_config('{"cluster": {}}'),
        ValueError, "`environ`", "mapping", "cluster", "Pass os.environ",
    ),
    "tf_config_not_text": (
        lambda: cluster.read_tf_config({"TF_CONFIG": {"cluster": {}}}),
        ValueError, "TF_CONFIG", "not text", "'cluster'", "`json.dumps`",
    ),
    "tf_config_quotes": (
        lambda: cluster.read_tf_config({"TF_CONFIG": "{'cluster': {}}"}),
        ValueError, "TF_CONFIG", "not valid JSON", "'cluster'", "`json.dumps`",
    ),
    "tf_config_port": (
        lambda: _tf_config(["localhost"]),
        ValueError, "TF_CONFIG", "bad address", "'localhost'", "1 to 65535",
    ),
    "tf_config_index": (
        lambda: _tf_config(["a:1", "b:1"], index=2),
        ValueError, "TF_CONFIG", "out of range", "Received: 2", "from 0 to 1",
    ),
    "tf_config_of_the_strategy": (
        lambda: _with_environment(TF_CONFIG="{]"),
        ValueError, "TF_CONFIG", "not valid JSON", r"\{\]", "`json.dumps`",
    ),
}  # fmt: skip


class MisuseOfArgumentsTest(misuses.MisuseTestCase):
    @parameterized.named_parameters((name, *row) for name, row in _ARGUMENTS.items())
    def test_argument(self, call, error, *parts):
        self.check(lambda _: call(), error, *parts)


if __name__ == "__main__":
    tf.test.main()
