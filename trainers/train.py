r"""Trains an image classifier with a swarm.

```bash
python -m trainers.train --dataset=digits --particles=4 --output_dir=runs/digits
python -m tf_psops.launch --num_workers=4 -- \
    python -m trainers.train --dataset=mnist --epochs=1
```
"""

import json
import math
import os
import pathlib

import tensorflow as tf
from absl import app, flags, logging

from tf_psops import cluster
from trainers import datasets, files, models, training
from trainers.rules import RULES

_DATASET = flags.DEFINE_enum("dataset", "digits", datasets.NAMES, "Data set.")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Folder of TensorFlow Datasets, for mnist and cifar10."
)
_MODEL = flags.DEFINE_enum("model", "lenet", models.NAMES, "Network.")
_RULE = flags.DEFINE_enum("rule", "pso", tuple(RULES), "Synchronisation rule.")
_SYNC_EVERY = flags.DEFINE_integer(
    "sync_every", 10, "Local steps between two synchronisations.", lower_bound=1
)
_PARTICLES = flags.DEFINE_integer(
    "particles",
    None,
    "Particles in this process; 4 by default. Workers of TF_CONFIG are one each.",
    lower_bound=1,
)
_EPOCHS = flags.DEFINE_integer(
    "epochs", 10, "Passes of the swarm over the training data.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 32, "Examples per particle and step.", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.05, "Learning rate of SGD.")
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of weights, data order and rule.", lower_bound=0
)
_OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Folder for the results; without it no file is written."
)

_FLAGS = (
    _DATASET,
    _DATA_DIR,
    _MODEL,
    _RULE,
    _SYNC_EVERY,
    _PARTICLES,
    _EPOCHS,
    _BATCH_SIZE,
    _LEARNING_RATE,
    _SEED,
    _OUTPUT_DIR,
)

flags.register_validator(
    "learning_rate",
    lambda value: 0 < value < math.inf,
    message="Expected a finite number above 0.",
)
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


def main(argv):
    """Trains as the flags say and shows the result."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Expected flags only.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        tf.get_logger().setLevel("WARNING")
    arguments = {flag.name: flag.value for flag in _FLAGS}
    result = training.train(**arguments)
    print(training.format_result(result))
    worker = cluster.read_tf_config()
    if _OUTPUT_DIR.value and (worker is None or worker.is_chief):
        files.write_text(
            pathlib.Path(_OUTPUT_DIR.value) / "flags.json",
            json.dumps(arguments, indent=2) + "\n",
        )


if __name__ == "__main__":
    app.run(main)
