"""Trains a classifier of handwritten digits on the workers of `TF_CONFIG`.

```bash
export TF_CONFIG='{"cluster": {"worker": ["node1:2222", "node2:2222"]},
                   "task": {"type": "worker", "index": 0}}'
python examples/several_machines/train_digits.py --model=digits.keras
```

Each machine runs the same command with its own `index`. Without `TF_CONFIG` one worker
trains alone. For real data change `load_digits` and the model.
"""

import argparse

import keras
from sklearn.datasets import load_digits

import tf_psops


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the file that the chief saves")
    parser.add_argument("--backup_dir", help="a folder, the same on each start")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()

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
    sync = tf_psops.PSOSync(10, backup_dir=arguments.backup_dir)
    callbacks = [sync, keras.callbacks.ModelCheckpoint(arguments.model)]
    batch_size = 32 * strategy.num_replicas_in_sync
    verbose = 2 if strategy.is_chief else 0
    model.fit(x / 16, y, batch_size, arguments.epochs, verbose, callbacks=callbacks)
    model.save(arguments.model)  # All workers call it; the chief alone writes.
    print(
        f"Worker {strategy.worker_index} of {strategy.num_workers}: "
        f"{sync.num_syncs} synchronisations"
    )


if __name__ == "__main__":
    main()
