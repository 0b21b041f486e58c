"""Trains a network with a swarm: the function behind `trainers.train`."""

import json
import operator
import os
import pathlib
import sys
import time
from typing import NamedTuple

import keras

import tf_psops
from trainers import datasets, evaluation, models, optimizers, run_files
from trainers.files import make_folder, write_text
from trainers.rules import RULES

SCHEDULES = ("constant", "cosine")


class Result(NamedTuple):
    """What a training run ends with, the same on every worker.

    Attributes:
        test_accuracy: Accuracy of the swarm's agreed model on the test set, 0 to 1.
        test_loss: Its mean cross-entropy on the test set, of text in bits per byte.
        particle_test_accuracies: The accuracy of each particle after its last step,
            before the last synchronisation.
        particle_test_losses: Their mean cross-entropies, likewise.
        num_particles: Number of particles, on all workers.
        num_syncs: Number of synchronisations.
        sync_seconds: Wall seconds that this worker spent in them.
        train_seconds: Wall seconds of `fit`, the synchronisations included.
        steps: Local steps of each particle.
    """

    test_accuracy: float
    test_loss: float
    particle_test_accuracies: list[float]
    particle_test_losses: list[float]
    num_particles: int
    num_syncs: int
    sync_seconds: float
    train_seconds: float
    steps: int


def train(
    *,
    dataset="digits",
    data_dir=None,
    model="lenet",
    rule="pso",
    sync_every=10,
    particles=None,
    epochs=10,
    steps=None,
    batch_size=32,
    optimizer="sgd",
    learning_rate=0.05,
    schedule="constant",
    weight_decay=0.0,
    clipnorm=None,
    seed=0,
    output_dir=None,
    backup_dir=None,
    elastic=False,
):
    """Trains a classifier or a language model with a swarm, and tests it.

    With `TF_CONFIG` set, every worker calls it with the same arguments and is one
    particle; otherwise all particles live in this process. The chief shows the
    progress and writes the files.

    Args:
        dataset: One of `trainers.datasets.NAMES`. Defaults to "digits".
        data_dir: Where TensorFlow Datasets keeps its own. Defaults to
            `~/tensorflow_datasets`.
        model: One of `trainers.models.NAMES`, "transformer" for text and the others for
            images. Defaults to "lenet".
        rule: One of `trainers.rules.RULES`. Defaults to "pso".
        sync_every: Local steps between two synchronisations. Defaults to 10.
        particles: Number of particles. Defaults to 4, or under `TF_CONFIG` to the
            number of workers, the only one possible there.
        epochs: Passes of the whole swarm over the training data. Defaults to 10.
        steps: If given, the local steps of each particle, in place of `epochs`; they
            count as one epoch.
        batch_size: Examples per particle and step. Defaults to 32.
        optimizer: That of each particle, one of `trainers.optimizers.NAMES`. Defaults
            to "sgd".
        learning_rate: The highest learning rate. Defaults to 0.05.
        schedule: "constant", or "cosine" for `optimizers.warmup_cosine`. Defaults to
            "constant".
        weight_decay: See `optimizers.make`. Defaults to 0.
        clipnorm: See `optimizers.make`. Defaults to `None`.
        seed: Seed of the initial weights, the order of the data and the rule.
            Defaults to 0.
        output_dir: Folder for `flags.json`, these arguments; `metrics.jsonl`, a line
            for each epoch; `swarm.jsonl`, a line for each synchronisation
            (`run_files.SwarmLog`); `result.json`, `model.keras` and TensorBoard's
            events; made if needed. `trainers.report` shows it. Defaults to none: no
            files.
        backup_dir: Folder for backups, from which the same call goes on after it was
            cut short; see `tf_psops.PSOSync`. Defaults to none.
        elastic: Whether a backup of another number of particles will do. Defaults to
            `False`.

    Returns:
        A `Result`.

    Raises:
        ValueError: If an argument is out of its range, or `particles` is not the
            number of workers.
        OSError: If the data cannot be had, or `output_dir` cannot be written.

    Example:

    ```python
    result = train(dataset="digits", particles=4, sync_every=10)
    print(result.test_accuracy)
    ```
    """
    arguments = {**locals()}
    if schedule not in SCHEDULES:
        raise ValueError(
            f"Unknown `schedule`. Received: {schedule!r}. Expected: {SCHEDULES}."
        )
    if rule not in RULES:
        raise ValueError(
            f"Unknown `rule`. Received: {rule!r}. Expected: {list(RULES)}."
        )
    keras.utils.set_random_seed(seed)
    strategy = _make_strategy(particles)
    chief = strategy.worker_index == 0
    output = pathlib.Path(output_dir) if output_dir and chief else None
    if output:
        make_folder(output)
        write_text(output / "result.json", "{}\n")
        written = json.dumps(arguments, indent=2, default=str) + "\n"
        write_text(output / "flags.json", written)

    data = datasets.load(dataset, data_dir)
    swarm = {"num_particles": strategy.num_replicas_in_sync, "batch_size": batch_size}
    epochs, steps, passes = datasets.duration(
        len(data.train_labels), epochs=epochs, steps=steps, **swarm
    )
    rate = learning_rate
    if schedule == "cosine":
        rate = optimizers.warmup_cosine(rate, epochs * steps)
    test = datasets.test_dataset(data, batch_size=500)
    with strategy.scope():
        network = models.build(model, data.input_shape, data.num_classes, seed)
        network.compile(
            optimizer=optimizers.make(optimizer, rate, weight_decay, clipnorm),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )

    sync = tf_psops.PSOSync(
        sync_every, RULES[rule](), backup_dir=backup_dir, elastic=elastic
    )
    particle_evaluation = evaluation.ParticleEvaluation(test)
    callbacks = [particle_evaluation, sync]
    if output:
        callbacks += [
            run_files.MetricsLog(output / "metrics.jsonl", sync),
            run_files.SwarmLog(output / "swarm.jsonl", sync),
            keras.callbacks.TensorBoard(output, write_graph=False),
        ]
    start = time.perf_counter()
    network.fit(
        datasets.train_dataset(data, epochs=passes, seed=seed, **swarm),
        epochs=epochs,
        steps_per_epoch=steps,
        shuffle=False,
        callbacks=callbacks,
        verbose=0 if not chief else 1 if sys.stdout.isatty() else 2,
    )
    train_seconds = time.perf_counter() - start

    score = evaluation.evaluate_swarm(network, test)
    loss = operator.attrgetter("bits" if dataset in datasets.TEXTS else "loss")
    result = Result(
        test_accuracy=score.accuracy,
        test_loss=loss(score),
        particle_test_accuracies=[s.accuracy for s in particle_evaluation.scores],
        particle_test_losses=[loss(s) for s in particle_evaluation.scores],
        num_particles=strategy.num_replicas_in_sync,
        num_syncs=sync.num_syncs,
        sync_seconds=sync.sync_seconds,
        train_seconds=train_seconds,
        steps=int(network.optimizer.iterations.value.read_value()),
    )
    if output:
        write_text(
            output / "result.json", json.dumps(result._asdict(), indent=2) + "\n"
        )
        network.save(output / "model.keras")
    return result


def format_result(result):
    """Returns a short table of a `Result`, for people to read."""
    rows = [
        (f"particle {i}", loss, accuracy)
        for i, (loss, accuracy) in enumerate(
            zip(result.particle_test_losses, result.particle_test_accuracies)
        )
    ]
    rows.append(("swarm", result.test_loss, result.test_accuracy))
    lines = [f"{'':12} {'test loss':>10} {'test accuracy':>14}"]
    lines += [
        f"{name:12} {loss:10.4f} {accuracy:14.4f}" for name, loss, accuracy in rows
    ]
    lines.append(
        f"{result.num_syncs} synchronisations in {result.steps} steps took "
        f"{result.sync_seconds:.1f} of {result.train_seconds:.1f} seconds."
    )
    return "\n".join(lines)


def _make_strategy(particles):
    if not os.environ.get("TF_CONFIG"):
        return tf_psops.SwarmStrategy.in_process(4 if particles is None else particles)
    strategy = tf_psops.SwarmStrategy()
    if particles not in (None, strategy.num_replicas_in_sync):
        raise ValueError(
            "Invalid value for argument `particles`. Expected "
            f"{strategy.num_replicas_in_sync}, the replicas of the workers in "
            f"TF_CONFIG. Received: particles={particles}. Leave it out, or start "
            "another number of workers."
        )
    return strategy
