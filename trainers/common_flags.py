"""The flags that `trainers.train` and `trainers.compare` share."""

import math
import os

from absl import flags

from trainers import datasets, models, optimizers

DATASET = flags.DEFINE_enum("dataset", "digits", datasets.NAMES, "Data set.")
DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Folder of TensorFlow Datasets, for mnist and cifar10."
)
MODEL = flags.DEFINE_enum(
    "model",
    "lenet",
    models.NAMES,
    "Network: the transformer for python_source, the others for images.",
)
OPTIMIZER = flags.DEFINE_enum(
    "optimizer", "sgd", optimizers.NAMES, "Optimizer of each particle."
)
WEIGHT_DECAY = flags.DEFINE_float(
    "weight_decay",
    0.0,
    "Share of the weights, times the learning rate, by which a step shrinks them.",
    lower_bound=0.0,
)
CLIPNORM = flags.DEFINE_float(
    "clipnorm", None, "Largest norm of each weight's gradient. No limit if unset."
)
PARTICLES = flags.DEFINE_integer(
    "particles",
    None,
    "Particles in this process. Workers of TF_CONFIG are one each.",
    lower_bound=1,
)
EPOCHS = flags.DEFINE_integer(
    "epochs", 10, "Passes of the swarm over the training data.", lower_bound=1
)
STEPS = flags.DEFINE_integer(
    "steps", None, "Local steps of each particle, instead of --epochs.", lower_bound=1
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
    "weight_decay", math.isfinite, message="Expected a finite number of at least 0."
)
flags.register_validator(
    "clipnorm",
    lambda value: value is None or 0 < value < math.inf,
    message="Expected a finite number above 0.",
)


@flags.multi_flags_validator(["dataset", "model"])
def _fit_together(values):
    text = values["dataset"] in datasets.TEXTS
    if text == (values["model"] in models.TEXT_MODELS):
        return True
    fitting = models.TEXT_MODELS if text else models.IMAGE_MODELS
    raise flags.ValidationError(
        f"--dataset={values['dataset']} takes another --model than {values['model']}. "
        f"Expected one of {', '.join(fitting)}."
    )


flags.register_validator(
    "output_dir",
    lambda value: value is None or not os.path.exists(value) or os.path.isdir(value),
    message="Expected a folder, or a path where one can be made; it is a file.",
)
