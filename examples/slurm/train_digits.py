"""Trains a classifier of handwritten digits as a job step of Slurm.

```bash
srun --nodes=2 --ntasks-per-node=1 python examples/slurm/train_digits.py \
    --backup_dir=/shared/digits/backups --model=/shared/digits/model.keras
```

`train.sbatch` does so as a batch job. For real data change `load_digits` and the model;
give each task a GPU with `gpus_per_node` and `gpus_per_task` as your nodes have them.
"""

import argparse

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

import tf_psops


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backup_dir", required=True, help="all nodes see it")
    parser.add_argument("--model", required=True, help="the file to save")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--port", type=int, default=8888, help="the first of a node")
    arguments = parser.parse_args()

    # Without GPUs: by default TensorFlow counts them with `nvidia-smi`, and fails
    # where there is none. Here they only have to be at least as many as tasks.
    resolver = tf.distribute.cluster_resolver.SlurmClusterResolver(
        port_base=arguments.port, gpus_per_node=8, gpus_per_task=1, auto_set_gpu=False
    )
    keras.utils.set_random_seed(0)
    strategy = tf_psops.SwarmStrategy(cluster_resolver=resolver)
    with strategy.scope():
        model = keras.Sequential(
            [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        model.compile(optimizer, loss, metrics=["accuracy"])
    x, y = load_digits(return_X_y=True)
    sync = tf_psops.PSOSync(10, backup_dir=arguments.backup_dir)
    batch_size = 32 * strategy.num_replicas_in_sync
    verbose = 2 if strategy.is_chief else 0
    model.fit(x / 16, y, batch_size, arguments.epochs, verbose, callbacks=[sync])
    model.save(arguments.model)
    if strategy.is_chief:
        print(f"{strategy.num_workers} workers, {sync.num_syncs} synchronisations")


if __name__ == "__main__":
    main()
