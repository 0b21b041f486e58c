"""Trains a new head on a trained network of `keras.applications`, and then all of it.

```bash
python examples/transfer_learning.py
python -m tf_psops.launch --num_workers=2 -- python examples/transfer_learning.py
```

Nothing is downloaded: a small network that has learnt the digits 0 to 4 stands for
`weights="imagenet"`, and learns 5 to 9. For real use load those weights, take images of
224 x 224, more epochs, and a GPU for each particle. Frozen weights do not move, so that
the synchronisations of the first `fit` move the head alone.
"""

import argparse
import os

import keras
import numpy as np
from sklearn.datasets import load_digits

import tf_psops


def images(digits):
    """Returns some digits as images in colour, and their classes from 0."""
    x, y = load_digits(return_X_y=True)
    chosen = np.isin(y, digits)
    x = np.kron(x[chosen].reshape(-1, 8, 8, 1), np.ones([4, 4, 3])) * 15.9
    x = keras.applications.mobilenet.preprocess_input(x.astype("float32"))
    return x, y[chosen] - min(digits)


def network():
    """Returns the first layers of a network, which are enough for small images."""
    base = keras.applications.MobileNet(
        input_shape=[32, 32, 3], alpha=0.5, include_top=False, weights=None
    )
    return keras.Model(base.input, base.get_layer("conv_pw_3_relu").output)


def with_head(base):
    inputs = keras.Input([32, 32, 3])
    features = keras.layers.GlobalAveragePooling2D()(base(inputs))
    return keras.Model(inputs, keras.layers.Dense(5)(features))


def compile_for_classes(model, learning_rate):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])


def trained_weights(epochs):
    """Returns what stands for `weights="imagenet"`, trained by plain Keras."""
    base = network()
    model = with_head(base)
    compile_for_classes(model, 0.003)
    model.fit(*images([0, 1, 2, 3, 4]), 32, epochs, verbose=0)
    return base.get_weights()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5, help="of each part")
    epochs = parser.parse_args().epochs

    keras.utils.set_random_seed(0)
    on_cluster = os.environ.get("TF_CONFIG")
    make = tf_psops.SwarmStrategy
    strategy = make() if on_cluster else make.in_process(2)
    verbose = 2 if strategy.is_chief else 0
    x, y = images([5, 6, 7, 8, 9])
    weights = trained_weights(2 * epochs)

    def compile_and_fit(learning_rate):
        with strategy.scope():
            compile_for_classes(model, learning_rate)
        sync = tf_psops.PSOSync(5)
        batch_size = 16 * strategy.num_replicas_in_sync
        model.fit(x, y, batch_size, epochs, verbose, callbacks=[sync])
        return sync.log[-1]["bytes"]

    with strategy.scope():
        base = network()
        base.set_weights(weights)
        base.trainable = False
        model = with_head(base)
    few = compile_and_fit(0.01)
    base.trainable = True
    for layer in base.layers:
        # Its statistics stay: too few steps follow for new ones.
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False
    many = compile_and_fit(0.001)
    loss, accuracy = model.evaluate(x, y, batch_size=256, verbose=0)
    if strategy.is_chief:
        print(f"agreed model: loss {loss:.3f}, accuracy {accuracy:.3f}")
        print(f"sent at a synchronisation: {few} bytes frozen, {many} unfrozen")


if __name__ == "__main__":
    main()
