"""A table of misuses: each is an error that says what is wrong and what to do."""

import json
import os
import pathlib
import resource
import time
from typing import NamedTuple
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl import app, flags
from absl.testing import flagsaver, parameterized
from keras import layers

import tf_psops
from tf_psops import cluster, launch
from trainers import compare, datasets, train, training

_SECONDS = 5
_NAN = float("nan")


def _strategy(**kwargs):
    return tf_psops.SwarmStrategy(devices=["CPU:0"], **kwargs)


def _scope(particles=2):
    return tf_psops.SwarmStrategy.in_process(particles).scope()


def _launch(command=("true",), num_workers=1, **kwargs):
    return launch.launch(command, num_workers, **kwargs)


def _tf_config(workers, index=0):
    config = {"cluster": {"worker": workers}, "task": {"type": "worker"}}
    config["task"]["index"] = index
    return cluster.read_tf_config({"TF_CONFIG": json.dumps(config)})


# Name: what is called, the error, and what its text says in this order.
_ARGUMENTS = {
    "devices_none": (
        lambda: tf_psops.SwarmStrategy(devices=[]),
        ValueError, "`devices`", "'GPU:0', 'GPU:1'", r"devices=\[\]",
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
    "communication_options": (
        lambda: _strategy(communication_options="NCCL"),
        ValueError, "`communication_options`", "CommunicationOptions", "'NCCL'",
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
        lambda: tf_psops.PSOSync(_NAN),
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
        ValueError, "`optimizer_slots`", "'average' or 'local'", "=None",
    ),
    "payload_dtype": (
        lambda: tf_psops.PSOSync(1, payload_dtype="float64"),
        ValueError, "`payload_dtype`", "'float16', 'bfloat16' or None", "'float64'",
    ),
    "centroid_inertia_negative": (
        lambda: tf_psops.CentroidSwarm(inertia=(0.3, -0.1)),
        ValueError, "`inertia`", "a tuple of numbers above 0", r"\(0.3, -0.1\)",
    ),
    "centroid_inertia_number": (
        lambda: tf_psops.CentroidSwarm(inertia=0.3),
        ValueError, "`inertia`", "a tuple of numbers above 0", "inertia=0.3",
    ),
    "centroid_inertia_bool": (
        lambda: tf_psops.CentroidSwarm(inertia=(True,)),
        ValueError, "`inertia`", "a tuple of numbers above 0", r"\(True,\)",
    ),
    "centroid_tolerance": (
        lambda: tf_psops.CentroidSwarm(tolerance=_NAN),
        ValueError, "`tolerance`", "at least 0", "tolerance=nan",
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
        lambda: _launch(stall_timeout=_NAN),
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


def _with_environment(**environ):
    with mock.patch.dict(os.environ, environ):
        tf_psops.SwarmStrategy()


class _State(NamedTuple):
    memory: tf.Tensor


class _OtherState(NamedTuple):
    memory: tf.Tensor


def _remember(self, position):
    return _State(position)


def _rule(**members):
    """Returns a rule named Mine, which averages but for some members."""
    average = {"move": lambda self, state, position, news, sizes: (state, news.vector)}
    return type("Mine", (tf_psops.Rule,), {**average, **members})()


def _move(function, **members):
    return _rule(
        move=lambda self, state, position, news, sizes: function(state, position, news),
        **members,
    )


def _offer(function, **members):
    return _rule(
        offer=lambda self, state, position, fitness: function(state, position, fitness),
        **members,
    )


class _NoMove(tf_psops.Rule):
    pass


# Name: the rule, the error, and what its text says in this order.
_RULES = {
    "exchange": (
        lambda: _rule(exchange="sum"),
        ValueError, "`rule.exchange`", "'best' or 'mean'", "'sum'",
    ),
    "no_move": (
        _NoMove,
        ValueError, "`rule`", "the function `move`", "_NoMove", "Define _NoMove.move",
    ),
    "no_trial": (
        lambda: _rule(num_trials=2),
        ValueError, "`rule`", "the function `trial`", "Mine", "Define Mine.trial",
    ),
    "num_trials": (
        lambda: _rule(num_trials=1.5),
        ValueError, "`rule.num_trials`", "whole number", "=1.5",
    ),
    "init_none": (
        lambda: _rule(init=lambda self, position: None),
        ValueError, "Mine", "`init`", "`NamedTuple`", "Received: None", "Rule.init",
    ),
    "init_number": (
        lambda: _rule(init=lambda self, position: _State(0.0)),
        ValueError, "Mine", "`init`", "of tensors", r"memory=0\.0", "Rule.init",
    ),
    "move_shape": (
        lambda: _move(lambda state, x, news: (state, x[1:])),
        ValueError, "Mine", "`move`", r"float32 \(15,\)", r"float32 \(14,\)", "Rule.m",
    ),
    "move_dtype": (
        lambda: _move(lambda state, x, news: (state, tf.cast(x, tf.float16))),
        ValueError, "Mine", "`move`", r"float32 \(15,\)", r"float16 \(15,\)", "Rule.m",
    ),
    "move_nothing": (
        lambda: _move(lambda state, x, news: None),
        ValueError, "Mine", "`move`", r"float32 \(15,\)", "Received: None", "Rule.m",
    ),
    "move_without_state": (
        lambda: _move(lambda state, x, news: x),
        ValueError, "Mine", "`move`", r"\(\(\), '", r"float32 \(15,\)\.", "Rule.m",
    ),
    "move_other_state": (
        lambda: _move(lambda state, x, news: (_OtherState(x), x), init=_remember),
        ValueError, "Mine", "`move`", r"_State\(mem", r"_OtherState\(mem", "Rule.m",
    ),
    "move_state_shape": (
        lambda: _move(lambda state, x, news: (_State(x[1:]), x), init=_remember),
        ValueError, "Mine", "`move`", r"_State\(.*15", r"_State\(.*14", "Rule.move",
    ),
    "move_nan": (
        lambda: _move(lambda state, x, news: (state, x * _NAN)),
        FloatingPointError, "Mine", r"\[0, 1\]", "synchronisation 0", "`move`", "Look",
    ),
    "move_nan_of_one": (
        lambda: _move(
            lambda state, x, news: (state, x / tf.cast(1 - news.particle, x.dtype))
        ),
        FloatingPointError, "Mine", r"\[1\]", "synchronisation 0", "`move`", "Look",
    ),
    "offer_shape": (
        lambda: _offer(lambda state, x, loss: (state, tf_psops.Offer(x[1:], loss))),
        ValueError, "Mine", "`offer`", r"vector='float32 \(15", r"\(14", "Rule.offer",
    ),
    "offer_score": (
        lambda: _offer(
            lambda state, x, loss: (state, tf_psops.Offer(x, x)), exchange="best"
        ),
        ValueError, "Mine", "`offer`", r"score='float32 \(\)", r"\(15,\)'\)\)\. See",
    ),
    "offer_tuple": (
        lambda: _offer(lambda state, x, loss: (state, (x, loss))),
        ValueError, "Mine", "`offer`", r"Expected: \(\(\), Offer\(", "Received", "See",
    ),
    "offer_infinite": (
        lambda: _offer(lambda state, x, loss: (state, tf_psops.Offer(x / 0, loss))),
        FloatingPointError, "Mine", r"\[0, 1\]", "synchronisation 0", "Look for",
    ),
    "trial_shape": (
        lambda: _rule(
            num_trials=1, trial=lambda self, k, state, news, sizes: news.vector[1:]
        ),
        ValueError, "Mine", "`trial`", r"float32 \(15,\)", r"float32 \(14,\)", "Rule.t",
    ),
    "agreed_shape": (
        lambda: _rule(agreed=lambda self, state, vector: vector[1:]),
        ValueError, "Mine", "`agreed`", r"float32 \(15,\)", r"float32 \(14,\)", "See",
    ),
    "agreed_nan": (
        lambda: _rule(agreed=lambda self, state, vector: vector * _NAN),
        FloatingPointError, "Mine", "not finite", "`agreed`", "Look for",
    ),
}  # fmt: skip


def _model():
    return keras.Sequential([keras.Input([4]), layers.Dense(3)])


def _compile(model, optimizer="sgd", **kwargs):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **kwargs)
    return model


def _swarm(optimizer="sgd", make=_model, particles=2, **kwargs):
    with _scope(particles):
        return _compile(make(), optimizer, **kwargs)


_X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
_Y = _X.argmax(-1) % 3


def _fit(model, sync=None, *callbacks, data=None):
    sync = sync or tf_psops.PSOSync(1, tf_psops.ParameterAverage())
    data = data or tf.data.Dataset.from_tensor_slices((_X, _Y)).batch(4)
    model.fit(data, callbacks=[*callbacks, sync], verbose=0)


def _model_of_another_strategy():
    with _scope():
        model = _model()
    with _scope():
        _compile(model)
    _fit(model)


def _compiled_outside():
    with _scope():
        model = _model()
    _fit(_compile(model))


def _optimizer_of(strategy):
    with strategy.scope():
        optimizer = keras.optimizers.SGD(0.1)
    _fit(_swarm(optimizer))


def _uncompiled():
    with _scope():
        _fit(_model())


def _unbuilt():
    class Lazy(keras.Model):
        def call(self, x):
            raise NotImplementedError("what call does")

    _fit(_swarm(make=Lazy))


def _mirrored():
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        _fit(_compile(_model()))


def _one_sync_for_two_models():
    first, second = _swarm(), _swarm()
    sync = tf_psops.PSOSync(1, tf_psops.ParameterAverage())
    inner = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: _fit(second, sync) if batch else None
    )
    _fit(first, sync, inner)


def _trials_on_sparse_rows():
    sparse = tf.data.Dataset.from_tensor_slices((tf.sparse.from_dense(_X), _Y)).batch(4)
    _fit(_swarm(), tf_psops.PSOSync(1), data=sparse)


# Name: what is called, the error, and what its text says in this order.
_TRAINING = {
    "model_outside": (
        lambda: _fit(_compile(_model())),
        ValueError, "PSOSync", "model", "DefaultDistributionStrategy", "with strategy",
    ),
    "mirrored_strategy": (
        _mirrored,
        ValueError, "PSOSync", "model", "under MirroredStrategy", "with strategy.scope",
    ),
    "model_of_another_strategy": (
        _model_of_another_strategy,
        ValueError, "PSOSync needs an optimizer", "SGD", "SwarmStrategy", "of one str",
    ),
    "compiled_outside": (
        _compiled_outside,
        ValueError, "PSOSync needs an optimizer", "SGD", "outside of it", "with strat",
    ),
    "optimizer_outside": (
        lambda: _fit(_swarm(keras.optimizers.SGD(0.1))),
        ValueError, "PSOSync needs an optimizer", "SGD", "outside of it", "with strate",
    ),
    # Keras makes its slots before any callback is called; this is TensorFlow's error.
    "optimizer_with_slots_outside": (
        lambda: _fit(_swarm(keras.optimizers.Adam(0.1))),
        RuntimeError, "Mixing different tf.distribute.Strategy", "SwarmStrategy",
    ),
    "optimizer_of_another_swarm": (
        lambda: _optimizer_of(tf_psops.SwarmStrategy.in_process(3)),
        ValueError, "PSOSync needs an optimizer", "SGD", "SwarmStrategy", "of one str",
    ),
    "optimizer_of_another_strategy": (
        lambda: _optimizer_of(tf.distribute.MirroredStrategy(["CPU:0"])),
        ValueError, "PSOSync needs an optimizer", "SGD", "Mirrored", "of one strategy",
    ),
    "no_optimizer": (
        lambda: _fit(_swarm(None)),
        ValueError, "needs a model with an optimizer", "optimizer=None", "Compile",
    ),
    "uncompiled": (
        _uncompiled,
        ValueError, r"You must call `compile\(\)` before",
    ),
    "unbuilt": (
        _unbuilt,
        RuntimeError, "Unable to automatically build the model", "Please build it",
        "what call does",
    ),
    "jit_compile_of_two_particles": (
        lambda: _fit(_swarm(jit_compile=True)),
        ValueError, "XLA", "jit_compile=True with 2 local", "jit_compile=False",
    ),
    "jit_compile_of_trials": (
        lambda: _fit(_swarm(jit_compile=True, particles=1), tf_psops.PSOSync(1)),
        ValueError, "XLA", "rule=CentroidSwarm", "jit_compile=False",
    ),
    "steps_per_execution": (
        lambda: _fit(_swarm(steps_per_execution=2), tf_psops.PSOSync(3)),
        ValueError, "sync_every=3", "steps_per_execution=2", "as a multiple",
    ),
    "two_syncs": (
        lambda: _fit(_swarm(), tf_psops.PSOSync(1), tf_psops.PSOSync(2)),
        ValueError, "more than one PSOSync", "2 in `callbacks`", "Keep one",
    ),
    "one_sync_for_two_models": (
        _one_sync_for_two_models,
        RuntimeError, "PSOSync", "another `fit` has taken over", "of its own",
    ),
    "backup_and_restore": (
        lambda: _fit(_swarm(), None, keras.callbacks.BackupAndRestore("backup")),
        ValueError, "one particle, not the swarm", "BackupAndRestore", r"backup_dir=",
    ),
    "trials_on_sparse_rows": (
        _trials_on_sparse_rows,
        ValueError, "dense tensors", "SparseTensor", r"tf_psops.ParameterAverage\(\)",
    ),
    "nan_in_the_data": (
        lambda: _fit(_swarm(), data=tf.data.Dataset.from_tensors((_X * _NAN, _Y))),
        FloatingPointError, "No particle", "synchronisation 0", "Lower the learning",
    ),
}  # fmt: skip


def _command(module, *arguments):
    with flagsaver.flagsaver():
        flags.FLAGS([module.__name__, *arguments])
        module.main([module.__name__])


# Name: the module, its arguments, the error, and what its text says in this order.
_COMMANDS = {
    "train_flag": (
        train, ["--sync_evry=3"],
        flags.UnrecognizedFlagError, "sync_evry", "Did you mean: sync_every",
    ),
    "train_dataset": (
        train, ["--dataset=svhn"],
        flags.IllegalFlagValueError, "--dataset=svhn", "one of <digits|mnist|cifar10>",
    ),
    "train_model": (
        train, ["--model=vgg"],
        flags.IllegalFlagValueError, "--model=vgg", "one of <mlp|lenet|resnet20>",
    ),
    "train_rule": (
        train, ["--rule=gossip"],
        flags.IllegalFlagValueError, "--rule=gossip", "one of <pso|average",
    ),
    "train_sync_every": (
        train, ["--sync_every=0"],
        flags.IllegalFlagValueError, "--sync_every=0", "positive integer",
    ),
    "train_epochs": (
        train, ["--epochs=two"],
        flags.IllegalFlagValueError, "--epochs=two", "invalid literal for int",
    ),
    "train_learning_rate": (
        train, ["--learning_rate=nan"],
        flags.IllegalFlagValueError, "--learning_rate=nan", "finite number above 0",
    ),
    "train_data_dir": (
        train, ["--data_dir=/nowhere"],
        flags.IllegalFlagValueError, "--data_dir=/nowhere", "existing", "Leave it out",
    ),
    "train_output_dir": (
        train, ["--output_dir=/dev/full"],
        flags.IllegalFlagValueError, "--output_dir=/dev/full", "Expected a folder",
    ),
    "compare_methods": (
        compare, ["--methods=pso,gossip"],
        flags.IllegalFlagValueError, "--methods=pso,gossip", "'gossip'", "Expected",
    ),
    "compare_constant": (
        compare, ["--methods=slowmo(inertia=-1)"],
        flags.IllegalFlagValueError, "--methods", "`inertia`", "Expected", "inertia=-1",
    ),
    "compare_partition": (
        compare, ["--partition=labels"],
        flags.IllegalFlagValueError, "--partition", "'labels'", "Expected.*'label'",
    ),
    "compare_intervals": (
        compare, ["--intervals=5,0"],
        flags.IllegalFlagValueError, "--intervals", "'0'", "Expected .* at least 1",
    ),
    "compare_learning_rates": (
        compare, ["--learning_rates=-1"],
        flags.IllegalFlagValueError, "--learning_rates", "'-1'", "Expected .* above 0",
    ),
    "launch_without_command": (
        launch, [],
        app.UsageError, "Expected a command after `--`", "Example",
    ),
}  # fmt: skip


def _save_on_a_full_disk(folder):
    model = _swarm()
    _fit(model)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        model.save(folder / "model.keras")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(folder.glob("*model*"))


def _train_on_a_full_disk(folder):
    (folder / ".result.json.unfinished").symlink_to("/dev/full")
    training.train(output_dir=folder)


def _save_below_a_file(folder):
    model = _swarm()
    _fit(model)
    model.save(folder / "file" / "model.keras")


# Name: what is called with a folder that has one file, the error, and what it says.
_FILES = {
    "save_below_a_file": (
        _save_below_a_file,
        OSError, "Cannot save the model", "file/model.keras", "Not a dir", "Choose",
    ),
    "save_on_a_full_disk": (
        _save_on_a_full_disk,
        OSError, "Cannot save the model", "model.keras", "too large", "Choose",
    ),
    "checkpoint_below_a_file": (
        lambda folder: _fit(
            _swarm(), None, keras.callbacks.ModelCheckpoint(folder / "file" / "a.keras")
        ),
        OSError, "Cannot save the model", "file/a.keras", "Not a dir", "Choose",
    ),
    "train_below_a_file": (
        lambda folder: _command(train, f"--output_dir={folder}/file/run"),
        OSError, "Cannot write", "file/run", "Not a directory", "another --output_dir",
    ),
    "train_on_a_full_disk": (
        _train_on_a_full_disk,
        OSError, "Cannot write", "result.json", "No space", "another --output_dir",
    ),
    "compare_below_a_file": (
        lambda folder: _command(compare, f"--output_dir={folder}/file/run"),
        OSError, "Cannot write", "file/run", "Not a directory", "another --output_dir",
    ),
    "data_dir_without_the_data": (
        lambda folder: datasets.load("mnist", folder),
        OSError, "'mnist' is not in", "Received: data_dir=", "Pass", "leave `data_dir`",
    ),
    "unknown_dataset": (
        lambda _: training.train(dataset="svhn"),
        ValueError, "`name`", "'svhn'", "Expected", "digits",
    ),
    "unknown_rule": (
        lambda _: training.train(rule="gossip"),
        ValueError, "`rule`", "'gossip'", "Expected", "'pso'",
    ),
    "unknown_partition": (
        lambda _: datasets.epoch_indices(
            np.arange(9), num_particles=1, batch_size=1, epoch=0, seed=0, partition="no"
        ),
        ValueError, "`partition`", "'no'", "Expected", "'label'",
    ),
    "batch_larger_than_the_data": (
        lambda _: training.train(batch_size=9999),
        ValueError, "batch_size=9999", "Expected", "lower one of them",
    ),
}  # fmt: skip


class MisuseTest(tf.test.TestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        _fit(_swarm())  # What TensorFlow and XLA do once is no part of an error.

    def _check(self, misuse, error, *parts):
        for attempt in range(3):  # The machine may be busy with something else.
            folder = pathlib.Path(self.get_temp_dir(), str(attempt))
            folder.mkdir()
            (folder / "file").touch()
            start = time.monotonic()
            with self.assertRaises(error) as raised:
                misuse(folder)
            seconds = time.monotonic() - start
            if seconds < _SECONDS:
                break
        self.assertLess(seconds, _SECONDS)
        self.assertRegex(str(raised.exception), "(?s)" + ".*".join(parts))

    @parameterized.named_parameters((name, *row) for name, row in _ARGUMENTS.items())
    def test_argument(self, call, error, *parts):
        self._check(lambda _: call(), error, *parts)

    @parameterized.named_parameters((name, *row) for name, row in _RULES.items())
    def test_rule(self, make, error, *parts):
        self._check(
            lambda _: _fit(_swarm(), tf_psops.PSOSync(1, make())), error, *parts
        )

    @parameterized.named_parameters((name, *row) for name, row in _TRAINING.items())
    def test_training(self, call, error, *parts):
        self._check(lambda _: call(), error, *parts)

    @parameterized.named_parameters((name, *row) for name, row in _COMMANDS.items())
    def test_command(self, module, arguments, error, *parts):
        self._check(lambda _: _command(module, *arguments), error, *parts)

    @parameterized.named_parameters((name, *row) for name, row in _FILES.items())
    def test_files(self, call, error, *parts):
        self._check(call, error, *parts)


if __name__ == "__main__":
    tf.test.main()
