"""Tables of misused flags, and of files that cannot be read or written."""

import resource

import keras
import misuses
import numpy as np
import tensorflow as tf
from absl import app, flags
from absl.testing import flagsaver, parameterized

from tf_psops import launch
from trainers import compare, datasets, train, training


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
    model = misuses.swarm()
    misuses.fit(model)
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
    model = misuses.swarm()
    misuses.fit(model)
    model.save(folder / "file" / "model.keras")


def _checkpoint_below_a_file(folder):
    checkpoint = keras.callbacks.ModelCheckpoint(folder / "file" / "a.keras")
    misuses.fit(misuses.swarm(), None, checkpoint)


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
        _checkpoint_below_a_file,
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


class MisuseOfCommandsAndFilesTest(misuses.MisuseTestCase):
    @parameterized.named_parameters((name, *row) for name, row in _COMMANDS.items())
    def test_command(self, module, arguments, error, *parts):
        self.check(lambda _: _command(module, *arguments), error, *parts)

    @parameterized.named_parameters((name, *row) for name, row in _FILES.items())
    def test_files(self, call, error, *parts):
        self.check(call, error, *parts)


if __name__ == "__main__":
    tf.test.main()
