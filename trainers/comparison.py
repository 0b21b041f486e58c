"""Runs the methods that `trainers.compare` compares, cell by cell, through `fit`."""

import ast
import functools
import inspect
import json
import sys
import time
from typing import NamedTuple

import keras
import numpy as np

import tf_psops
from trainers import datasets, evaluation, measures, models, optimizers
from trainers.files import write_text
from trainers.rules import RULES

HELD_OUT = 0.1
"""The share of the training set, of text of its files, to choose learning rates on."""

METHODS = ("local", "ssgd", *RULES)
"""All methods: also none at all, and gradients all-reduced at every step."""


def parse_methods(text):
    """Returns the methods of a list such as `average,pso(inertia=0.3)`.

    A method is one of `METHODS`, with arguments of its rule or of `PSOSync` in
    parentheses if need be.

    Args:
        text: Methods separated by commas, in Python's syntax.

    Returns:
        A list of strings, one for each method, in one way of writing.

    Raises:
        ValueError: If a method is unknown, or an argument is wrong.

    Example:

    ```python
    parse_methods("ssgd, pso(inertia=0.3, optimizer_slots='average')")
    ```
    """
    try:
        calls = ast.parse(f"[{text}]", mode="eval").body.elts
        methods = [ast.unparse(call) for call in calls]
        for method in methods:
            make_sync(method)
    except (SyntaxError, AttributeError, TypeError) as error:
        raise ValueError(f"Received methods={text!r}. {error}") from error
    if not methods:
        raise ValueError(f"Received methods={text!r}. Expected some of {METHODS}.")
    return methods


def make_sync(method, interval=sys.maxsize):
    """Returns the `PSOSync` of a method, `None` for "local" and "ssgd".

    Args:
        method: A string as from `parse_methods`.
        interval: Local steps between synchronisations. Defaults to any number.
    """
    call = ast.parse(method, mode="eval").body
    name = name_of(method)
    if name not in METHODS:
        raise ValueError(f"Received the method {method!r}. Expected some of {METHODS}.")
    arguments = {
        argument.arg: ast.literal_eval(argument.value)
        for argument in getattr(call, "keywords", ())
    }
    if getattr(call, "args", ()) or (arguments and name not in RULES):
        raise ValueError(
            f"Received the method {method!r}. Expected arguments by name, of a rule."
        )
    if name not in RULES:
        return None
    of_sync = set(inspect.signature(tf_psops.PSOSync).parameters) & set(arguments)
    options = {argument: arguments.pop(argument) for argument in of_sync}
    return tf_psops.PSOSync(interval, RULES[name](**arguments), **options)


def name_of(method):
    """Returns the name of a method without its arguments."""
    return method.partition("(")[0]


def interval_of(method, interval):
    """Returns the interval at which a method runs: 1 for "ssgd", 0 for "local"."""
    return {"local": 0, "ssgd": 1}.get(method, interval)


class Cell(NamedTuple):
    """One run of a comparison.

    Attributes:
        method: A method as from `parse_methods`.
        interval: Local steps between synchronisations; 1 for "ssgd", 0 for "local".
        partition: One of `datasets.PARTITIONS`.
        learning_rate: The highest learning rate, after warming up.
        seed: Seed of the initial weights, the partition and the order of the data.
        held_out: Whether the run trains without the held-out part of the training
            set and is evaluated on it, to choose a learning rate.
    """

    method: str
    interval: int
    partition: str
    learning_rate: float
    seed: int
    held_out: bool = False


class Comparison:
    """Runs cells of one comparison in this process, one after the other.

    All methods have the same initial weights and the same batches for the same seed
    and particle, and the same optimizer, whose learning rate rises over the first
    twentieth of the steps and falls to 0 by a cosine.

    Args:
        dataset: One of `datasets.NAMES`.
        model: One of `models.NAMES`.
        particles: Number of particles.
        batch_size: Examples per particle and step.
        epochs: Passes of the whole swarm over the training data.
        shards_per_worker: Label shards per particle of the partition "label".
        steps: If given, the local steps of each particle, in place of `epochs`.
        optimizer: One of `optimizers.NAMES`. Defaults to "sgd".
        weight_decay: See `optimizers.make`. Defaults to 0.
        clipnorm: See `optimizers.make`. Defaults to `None`.
        data_dir: Folder of TensorFlow Datasets. Defaults to its own default.
    """

    def __init__(
        self,
        dataset,
        model,
        particles,
        batch_size,
        epochs,
        shards_per_worker,
        steps=None,
        optimizer="sgd",
        weight_decay=0.0,
        clipnorm=None,
        data_dir=None,
    ):
        self._model_name = model
        self._duration = {"epochs": epochs, "steps": steps}
        self._optimizer = (optimizer, weight_decay, clipnorm)
        self._measure = measures.of_dataset(dataset)
        self._shards = shards_per_worker
        self._swarm = {"num_particles": particles, "batch_size": batch_size}
        # Before TensorFlow Datasets, which would initialise TensorFlow's devices.
        self._strategies = {
            share: tf_psops.SwarmStrategy.in_process(particles, share_gradients=share)
            for share in (False, True)
        }
        data = datasets.load(dataset, data_dir)
        self._data = {False: data, True: data.hold_out(HELD_OUT)}
        self._compiled = {}
        self._initial_weights = functools.cache(
            lambda seed: self._build(seed).get_weights()
        )

    def run(self, cell):
        """Trains one cell.

        Args:
            cell: A `Cell`.

        Returns:
            Its record: a dict that JSON can hold.
        """
        data = self._data[cell.held_out]
        epochs, steps_per_epoch, passes = datasets.duration(
            len(data.train_labels), **self._duration, **self._swarm
        )
        steps = epochs * steps_per_epoch
        network, sync = self._compile(cell, steps)
        _start_anew(network, self._initial_weights(cell.seed))
        test = datasets.test_dataset(data, batch_size=500)
        particle_evaluation = evaluation.ParticleEvaluation(test)
        curve = _Curve(every=max(1, steps // 50))
        callbacks = [curve, particle_evaluation]
        if sync is not None:
            callbacks.append(sync)
        start = time.perf_counter()
        network.fit(
            datasets.train_dataset(
                data,
                epochs=passes,
                seed=cell.seed,
                partition=cell.partition,
                shards_per_worker=self._shards,
                **self._swarm,
            ),
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
        seconds = time.perf_counter() - start
        particles = evaluation.Score(
            *np.mean(particle_evaluation.scores, axis=0).tolist()
        )
        score = evaluation.evaluate_swarm(network, test)
        if cell.method == "local":  # There is no agreed model.
            score = particles
        syncs = steps if cell.method == "ssgd" else sync.num_syncs if sync else 0
        weights = sum(int(np.prod(v.shape)) for v in network.trainable_variables)
        return {
            **cell._asdict(),
            "test_accuracy": score.accuracy,
            "test_loss": score.loss,
            **({"test_bits": score.bits} if self._measure is measures.BITS else {}),
            "swarm_mean_loss": particles.loss,
            "swarm_mean_accuracy": particles.accuracy,
            "bytes_per_worker": sync.bytes_moved if sync else syncs * weights * 4,
            "syncs": syncs,
            "seconds": seconds,
            "sync_seconds": sync.sync_seconds if sync else None,
            "steps": steps,
            "curve": curve.points,
        }

    def _compile(self, cell, steps):
        """Returns the compiled network and its `PSOSync`; alike cells share them."""
        key = (cell.method, cell.interval, cell.learning_rate, steps)
        if key not in self._compiled:
            self._compiled.clear()
            keras.backend.clear_session()
            with self._strategies[cell.method == "ssgd"].scope():
                network = self._build(seed=0)
                name, *options = self._optimizer
                schedule = optimizers.warmup_cosine(cell.learning_rate, steps)
                network.compile(
                    optimizer=optimizers.make(name, schedule, *options),
                    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                )
            self._compiled[key] = network, make_sync(cell.method, cell.interval)
        return self._compiled[key]

    def _build(self, seed):
        data = self._data[False]
        return models.build(self._model_name, data.input_shape, data.num_classes, seed)


class Runner:
    """Runs cells that are not in the file of results yet, and keeps what is done.

    Args:
        settings: The arguments of `Comparison` but `data_dir`, as a dict.
        path: A `pathlib.Path` of the results, a JSON list of records. Each finished
            cell is written at once, so that a later call goes on from there.
        data_dir: See `Comparison`.

    Raises:
        ValueError: If the file holds runs with other settings.

    Attributes:
        num_failed: The number of cells that failed.
    """

    def __init__(self, settings, path, data_dir=None):
        # Not before there is something to run: it loads the data.
        self._make_comparison = functools.cache(
            lambda: Comparison(**settings, data_dir=data_dir)
        )
        self._settings = settings
        self._path = path
        records = json.loads(path.read_text()) if path.exists() else []
        for record in records:
            if record["settings"] != settings:
                raise ValueError(
                    f"{path} holds runs with the settings {record['settings']}. "
                    f"Expected {settings}, to go on from there. Choose another output "
                    "folder, or the same settings."
                )
        self._done = {_cell_of(record): record for record in records}
        self.num_failed = 0

    def run(self, cell, report=print):
        """Returns the record of a cell, or `None` if it fails.

        Args:
            cell: A `Cell`.
            report: Called with a line of text for a cell that is run. Defaults to
                `print`.
        """
        if cell in self._done:
            return self._done[cell]
        comparison = self._make_comparison()
        try:
            record = comparison.run(cell)
        except Exception as error:  # One cell must not cost the others.
            self.num_failed += 1
            report(f"FAILED {cell}: {type(error).__name__}: {error}")
            return None
        record["settings"] = self._settings
        self._done[cell] = record
        write_text(self._path, json.dumps(list(self._done.values()), indent=1) + "\n")
        measure = measures.of_records([record])
        report(
            f"{cell.method}, n={cell.interval}, {cell.partition}, "
            f"lr={cell.learning_rate:g}, seed={cell.seed}: "
            f"{measure.text(measure.of(record))} {measure.name} in "
            f"{record['seconds']:.0f} s"
        )
        return record


def _cell_of(record):
    return Cell(**{field: record[field] for field in Cell._fields})


def _start_anew(network, weights):
    """Gives a compiled network its initial weights and an optimizer at rest."""
    network.set_weights(weights)
    for variable in network.optimizer.variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))


class _Curve(keras.callbacks.Callback):
    """Notes the mean training loss of the local particles every few steps."""

    def __init__(self, every):
        super().__init__()
        self._every = every
        self._steps = 0
        self._noted = (0, 0.0)
        self.points = []

    def on_epoch_begin(self, epoch, logs=None):
        self._noted = (0, 0.0)

    def on_train_batch_end(self, batch, logs=None):
        self._steps += 1
        if self._steps % self._every:
            return
        # Keras tells the mean since the epoch began.
        count, total = batch + 1, (batch + 1) * float(logs["loss"])
        mean = (total - self._noted[1]) / (count - self._noted[0])
        self._noted = (count, total)
        self.points.append([self._steps, mean])
