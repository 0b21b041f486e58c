"""Trains a classifier of handwritten digits on two workers of Ray Train.

```bash
python examples/ray/train_digits.py --storage=/shared/ray
```

Each worker is one particle. If one dies, Ray starts the whole group again, and training
goes on from the last backup. For real data change `load_digits` and the model, and say
how many workers, of what, in `ScalingConfig`.
"""

import argparse
import pathlib

import keras
from ray import train
from ray.train.tensorflow import TensorflowTrainer
from ray.train.tensorflow.keras import ReportCheckpointCallback
from sklearn.datasets import load_digits

import tf_psops


def train_worker(config):
    """Is what Ray calls on every worker, with `TF_CONFIG` set, in a thread."""
    keras.utils.set_random_seed(0)
    strategy = tf_psops.SwarmStrategy()
    with strategy.scope():
        model = keras.Sequential(
            [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        model.compile(optimizer, loss, metrics=["accuracy"])
    x, y = load_digits(return_X_y=True)
    callbacks = [
        tf_psops.PSOSync(10, backup_dir=config["backup_dir"]),
        # Every worker reports; what the chief alone writes is in Ray's checkpoint.
        ReportCheckpointCallback(),
    ]
    batch_size = 32 * strategy.num_replicas_in_sync
    model.fit(x / 16, y, batch_size, config["epochs"], callbacks=callbacks, verbose=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--storage", required=True, help="a folder that all nodes see")
    parser.add_argument("--name", default="digits", help="that of the training")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    storage = pathlib.Path(arguments.storage).resolve()
    trainer = TensorflowTrainer(
        train_worker,
        train_loop_config={
            "backup_dir": str(storage / f"{arguments.name}-backups"),
            "epochs": arguments.epochs,
        },
        scaling_config=train.ScalingConfig(num_workers=2),
        run_config=train.RunConfig(
            name=arguments.name,
            storage_path=str(storage),
            failure_config=train.FailureConfig(max_failures=3),
        ),
    )
    result = trainer.fit()
    print(f"accuracy {result.metrics['accuracy']:.4f}")
    print(f"checkpoint {result.checkpoint.path}")


if __name__ == "__main__":
    main()
