"""Bytes of Python's standard library, for language models."""

import hashlib
import pathlib
import sysconfig
from typing import NamedTuple

import numpy as np
import tensorflow as tf

CONTEXT = 64
"""Of how many bytes a model sees the first ones to tell the next."""

_TEST_SHARE = 0.1
_TEST_WINDOWS = 1024  # What evaluates every particle in seconds.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_OF_THE_MACHINE = ("_sysconfigdata", "config-", "sitecustomize")


class TextData(NamedTuple):
    """Windows of text, in memory.

    A window has one byte more than a model sees: the last one is only told. Windows of
    one file overlap by that byte, so that each byte but a file's first has to be told
    once.

    Attributes:
        train_windows: uint8 array [N, context + 1].
        train_labels: int32 array [N], the package that each window is from: a top-level
            folder or module. So "label" parts the particles' data by package.
        train_files: int32 array [N], the file that each window is from.
        test_windows: uint8 array [M, context + 1], evenly spread over files of their
            own.
    """

    train_windows: np.ndarray
    train_labels: np.ndarray
    train_files: np.ndarray
    test_windows: np.ndarray

    num_classes = 256

    @property
    def input_shape(self):
        """Returns the shape of what a model sees of a window."""
        return (self.train_windows.shape[1] - 1,)

    @property
    def train(self):
        """Returns the arrays of the training set."""
        return (self.train_windows,)

    @property
    def test(self):
        """Returns the arrays of the test set."""
        return (self.test_windows,)

    @staticmethod
    def prepare(windows):
        """Returns what a model gets, and what it has to give, of rows of the arrays."""
        windows = tf.cast(windows, tf.int32)
        return windows[:, :-1], windows[:, 1:]

    def hold_out(self, share):
        """Returns data whose test set is from a random share of the training files."""
        order = np.random.default_rng(0).permutation(np.unique(self.train_files))
        held_out = np.isin(self.train_files, order[int(len(order) * (1 - share)) :])
        return TextData(
            train_windows=self.train_windows[~held_out],
            train_labels=self.train_labels[~held_out],
            train_files=self.train_files[~held_out],
            test_windows=_spread(self.train_windows[held_out]),
        )


def load(root=None):
    """Loads Python source.

    Files are dealt to the training and the test set by a hash of their relative path:
    the same on every machine with the same version of Python. Tests are left out, and
    what was written for one machine.

    Args:
        root: Folder of the source. Defaults to the running Python's standard library.

    Returns:
        A `TextData`.

    Raises:
        OSError: If there is too little of it.
    """
    root = pathlib.Path(root or sysconfig.get_path("stdlib"))
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    windows = {False: [], True: []}
    for path in paths:
        if _LEFT_OUT & set(path.parts) or path.parts[0].startswith(_OF_THE_MACHINE):
            continue
        cut = _cut((root / path).read_bytes())
        windows[_is_test(path)].append((path, cut))
    if not all(sum(len(cut) for _, cut in part) for part in windows.values()):
        raise OSError(
            f"The source of Python's standard library is not in {str(root)!r}, or too "
            "little of it. Run a Python that was installed with its source."
        )
    packages = sorted({path.parts[0] for path, _ in windows[False]})
    train = [
        (cut, [packages.index(path.parts[0])] * len(cut), [number] * len(cut))
        for number, (path, cut) in enumerate(windows[False])
    ]
    cuts, labels, files = map(np.concatenate, zip(*train))
    return TextData(
        train_windows=cuts,
        train_labels=labels.astype(np.int32),
        train_files=files.astype(np.int32),
        test_windows=_spread(np.concatenate([cut for _, cut in windows[True]])),
    )


def _is_test(path):
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return int.from_bytes(digest[:8], "big") < _TEST_SHARE * 2**64


def _cut(text):
    """Returns the windows of a text, [N, CONTEXT + 1], without what is left over."""
    count = max(0, (len(text) - 1) // CONTEXT)
    starts = CONTEXT * np.arange(count)[:, np.newaxis]
    return np.frombuffer(text, np.uint8)[starts + np.arange(CONTEXT + 1)]


def _spread(windows):
    """Returns the windows, or so many of them from first to last as a test takes."""
    if len(windows) <= _TEST_WINDOWS:
        return windows
    return windows[np.linspace(0, len(windows) - 1, _TEST_WINDOWS).astype(int)]
