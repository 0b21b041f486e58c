r"""Trains a classifier of images, or a language model, with a swarm.

```bash
python -m trainers.train --dataset=digits --particles=4 --output_dir=runs/digits
python -m tf_psops.launch --num_workers=4 -- \
    python -m trainers.train --dataset=mnist --epochs=1
python -m trainers.train --dataset=python_source --model=transformer --steps=300 \
    --optimizer=adamw --learning_rate=0.003 --schedule=cosine --batch_size=8
```

The loss of text is in bits per byte.
"""

import math

import tensorflow as tf
from absl import app, flags, logging

from trainers import common_flags, training
from trainers.rules import RULES

_RULE = flags.DEFINE_enum("rule", "pso", tuple(RULES), "Synchronisation rule.")
_SYNC_EVERY = flags.DEFINE_integer(
    "sync_every", 10, "Local steps between two synchronisations.", lower_bound=1
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 0.05, "Highest learning rate.")
_SCHEDULE = flags.DEFINE_enum(
    "schedule",
    "constant",
    training.SCHEDULES,
    "The learning rate's; cosine rises over a twentieth of the steps and falls to 0.",
)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of weights, data order and rule.", lower_bound=0
)
_BACKUP_DIR = flags.DEFINE_string(
    "backup_dir", None, "Folder for backups, to go on from after a loss. None if unset."
)
_ELASTIC = flags.DEFINE_bool(
    "elastic", False, "Go on from a backup of another number of particles, too."
)
_FLAGS = (
    common_flags.DATASET,
    common_flags.DATA_DIR,
    common_flags.MODEL,
    _RULE,
    _SYNC_EVERY,
    common_flags.PARTICLES,
    common_flags.EPOCHS,
    common_flags.STEPS,
    common_flags.BATCH_SIZE,
    common_flags.OPTIMIZER,
    _LEARNING_RATE,
    _SCHEDULE,
    common_flags.WEIGHT_DECAY,
    common_flags.CLIPNORM,
    _SEED,
    common_flags.OUTPUT_DIR,
    _BACKUP_DIR,
    _ELASTIC,
)

flags.register_validator(
    "learning_rate",
    lambda value: 0 < value < math.inf,
    message="Expected a finite number above 0.",
)


def main(argv):
    """Trains as the flags say and shows the result."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Expected flags only.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        tf.get_logger().setLevel("WARNING")
    result = training.train(**{flag.name: flag.value for flag in _FLAGS})
    print(training.format_result(result))


if __name__ == "__main__":
    app.run(main)
