r"""Trains from TFRecord files, which the workers share out among themselves.

```bash
python -m tf_psops.launch --num_workers=2 -- \
    python examples/record_files.py --folder=/tmp/digits
```

There are at least as many files as workers, so each worker reads files of its own, and
no row of another's. With fewer each reads all, and takes its rows of each batch. For
real size write files of 100 MB and more, many times as many as workers, and put the
images into them as JPEG (`tf.io.encode_jpeg`, `tf.io.decode_jpeg`).
"""

import argparse
import os
import pathlib

import keras
import tensorflow as tf
from sklearn.datasets import load_digits

import tf_psops

_FILES = 8
_FEATURES = {
    "image": tf.io.FixedLenFeature([64], tf.float32),
    "label": tf.io.FixedLenFeature([], tf.int64),
}


def write(folder):
    """Writes the digits to files, one of which is read by one worker."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits(return_X_y=True)
    for number in range(_FILES):
        path = folder / f"digits-{number:05}-of-{_FILES:05}.tfrecord"
        partial = path.with_suffix(f".{os.getpid()}")
        with tf.io.TFRecordWriter(str(partial)) as writer:
            for image, label in zip(images[number::_FILES], labels[number::_FILES]):
                feature = {
                    "image": tf.train.Feature(
                        float_list=tf.train.FloatList(value=image / 16)
                    ),
                    "label": tf.train.Feature(
                        int64_list=tf.train.Int64List(value=[label])
                    ),
                }
                features = tf.train.Features(feature=feature)
                writer.write(tf.train.Example(features=features).SerializeToString())
        partial.rename(path)  # Whole files only, whoever writes them first.


def read(folder, batch_size):
    """Returns a data set of batches: that of the whole swarm on every worker."""
    names = sorted(str(path) for path in folder.glob("*.tfrecord"))

    def parse(records):
        row = tf.io.parse_example(records, _FEATURES)
        return row["image"], row["label"]

    return (
        tf.data.Dataset.from_tensor_slices(names)
        .shuffle(len(names), seed=0)
        .interleave(tf.data.TFRecordDataset, cycle_length=2)
        .shuffle(1000, seed=0)
        .repeat()
        .batch(batch_size)
        .map(parse, num_parallel_calls=2)
        .prefetch(2)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="of the files")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()

    folder = pathlib.Path(arguments.folder)
    write(folder)
    keras.utils.set_random_seed(0)
    on_cluster = os.environ.get("TF_CONFIG")
    make = tf_psops.SwarmStrategy
    strategy = make() if on_cluster else make.in_process(2)
    with strategy.scope():
        model = keras.Sequential(
            [keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)]
        )
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        model.compile(optimizer, loss, metrics=["accuracy"])
    batch_size = 32 * strategy.num_replicas_in_sync
    # Files are not of equal length: without `repeat` and this, neither are epochs.
    model.fit(
        read(folder, batch_size),
        epochs=arguments.epochs,
        steps_per_epoch=1797 // batch_size,
        verbose=2 if strategy.is_chief else 0,
        callbacks=[tf_psops.PSOSync(10)],
    )


if __name__ == "__main__":
    main()
