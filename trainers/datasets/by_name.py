"""The data sets that the command line knows by name."""

import os

from trainers.datasets import images, python_source

TEXTS = ("python_source",)
"""Those of text, for language models; the others are of images, for classifiers."""

NAMES = ("digits", "mnist", "cifar10", *TEXTS)


def load(
    name: str, data_dir: str | os.PathLike | None = None
) -> images.ImageData | python_source.TextData:
    """Loads a data set.

    "digits" comes with scikit-learn: 1437 training and 360 test images, 8x8x1, a
    fixed stratified split. "mnist" (28x28x1) and "cifar10" (32x32x3) are read with
    TensorFlow Datasets, which downloads them into its own folder if that lacks them.
    "python_source" is the source of the running Python's standard library.

    Args:
        name: One of `NAMES`.
        data_dir: Folder of TensorFlow Datasets that holds "mnist" and "cifar10".
            Defaults to `~/tensorflow_datasets`.

    Returns:
        The whole data set.

    Raises:
        ValueError: If `name` is unknown.
        OSError: If the data are not in `data_dir`, or cannot be downloaded.

    Example:

    ```python
    data = load("digits")
    data.train_images.shape  # (1437, 8, 8, 1)
    ```
    """
    if name not in NAMES:
        raise ValueError(f"Unknown `name`. Received: {name!r}. Expected: {NAMES}.")
    if name == "digits":
        return images.load_digits()
    if name == "python_source":
        return python_source.load()
    return images.load_tfds(name, data_dir)
