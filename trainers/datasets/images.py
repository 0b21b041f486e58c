"""Labelled images."""

import os
from typing import NamedTuple

import numpy as np
import tensorflow as tf


class ImageData(NamedTuple):
    """Labelled images, in memory.

    Pixels stay bytes, a quarter of the size of floats, because every worker process
    holds a copy; `prepare` scales them to [0, 1].

    Attributes:
        train_images: uint8 array [N, height, width, channels].
        train_labels: int32 array [N], each in [0, num_classes).
        test_images: uint8 array [M, height, width, channels].
        test_labels: int32 array [M].
        num_classes: Number of classes.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    num_classes: int

    @property
    def input_shape(self):
        """Returns the shape of an image."""
        return self.train_images.shape[1:]

    @property
    def train(self):
        """Returns the arrays of the training set."""
        return self.train_images, self.train_labels

    @property
    def test(self):
        """Returns the arrays of the test set."""
        return self.test_images, self.test_labels

    @staticmethod
    def prepare(images, labels):
        """Returns what a model gets, and what it has to give, of rows of the arrays."""
        return tf.cast(images, tf.float32) / 255, labels

    def hold_out(self, share):
        """Returns data whose test set is a random share of this training set."""
        order = np.random.default_rng(0).permutation(len(self.train_labels))
        cut = int(len(order) * (1 - share))
        train, held_out = order[:cut], order[cut:]
        return self._replace(
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.train_images[held_out],
            test_labels=self.train_labels[held_out],
        )


def load_digits():
    """Returns scikit-learn's digits, with a fixed stratified split."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    images, labels = datasets.load_digits(return_X_y=True)  # Pixels are 0, 1, ..., 16.
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images,
        labels.astype(np.int32),
        test_size=360,
        stratify=labels,
        random_state=0,
    )
    return ImageData(train_images, train_labels, test_images, test_labels, 10)


def load_tfds(name, data_dir):
    """Returns a data set of TensorFlow Datasets; see `load`."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_dir)
    if data_dir and not os.path.exists(builder.data_path):
        raise OSError(
            f"Data set {name!r} is not in {builder.data_path}. Received: data_dir="
            f"{os.fspath(data_dir)!r}. Pass the folder in which TensorFlow Datasets "
            "has prepared it, or leave `data_dir` out to download it."
        )
    try:
        builder.download_and_prepare()  # Returns at once if the data are there.
    except OSError as error:
        raise OSError(
            f"Data set {name!r} is not in {builder.data_path} and could not be "
            "downloaded. Pass a `data_dir` in which TensorFlow Datasets has "
            "prepared it, or connect this machine to the network."
        ) from error
    train, test = tfds.as_numpy(
        builder.as_dataset(split=["train", "test"], batch_size=-1)
    )
    return ImageData(
        train["image"],
        train["label"].astype(np.int32),
        test["image"],
        test["label"].astype(np.int32),
        builder.info.features["label"].num_classes,
    )
