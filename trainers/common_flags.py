"""The flags that `trainers.train` and `trainers.compare` share."""

import os

from absl import flags

from trainers import datasets, models

DATASET = flags.DEFINE_enum("dataset", "digits", datasets.NAMES, "Data set.")
DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Folder of TensorFlow Datasets, for mnist and cifar10."
)
MODEL = flags.DEFINE_enum("model", "lenet", models.NAMES, "Network.")
PARTICLES = flags.DEFINE_integer(
    "particles",
    None,
    "Particles in this process. Workers of TF_CONFIG are one each.",
    lower_bound=1,
)
EPOCHS = flags.DEFINE_integer(
    "epochs", 10, "Passes of the swarm over the training data.", lower_bound=1
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Examples per particle and step.", lower_bound=1
)
OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the results.")

flags.register_validator(
    "data_dir",
    lambda value: value is None or os.path.isdir(value),
    message="Expected an existing folder. Leave it out to download the data.",
)
flags.register_validator(
    "output_dir",
    lambda value: value is None or not os.path.exists(value) or os.path.isdir(value),
    message="Expected a folder, or a path where one can be made; it is a file.",
)
