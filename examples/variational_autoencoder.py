"""Trains a variational autoencoder with a `train_step` of its own.

```bash
python examples/variational_autoencoder.py
python -m tf_psops.launch --num_workers=2 -- python examples/variational_autoencoder.py
```

A `train_step` needs nothing of the swarm: `self.optimizer.apply` steps each particle by
its own gradients, and a metric `loss` tells how fit it is. For real size make the two
networks convolutional, and read images through `tf.data`.
"""

import argparse
import os

import keras
import tensorflow as tf
from keras import layers
from sklearn.datasets import load_digits

import tf_psops

_LATENT = 4


class VariationalAutoencoder(keras.Model):
    """Learns to draw what it is shown from a few numbers."""

    def __init__(self):
        super().__init__()
        hidden = {"activation": "relu"}
        self.encoder = keras.Sequential(
            [layers.Dense(64, **hidden), layers.Dense(2 * _LATENT)]
        )
        self.decoder = keras.Sequential([layers.Dense(64, **hidden), layers.Dense(64)])
        self.seeds = keras.random.SeedGenerator(0)
        self.loss_mean = keras.metrics.Mean("loss")
        self.distance_mean = keras.metrics.Mean("kl_divergence")

    @property
    def metrics(self):
        return [self.loss_mean, self.distance_mean]

    def call(self, images):
        mean, log_variance = tf.split(self.encoder(images), 2, axis=1)
        noise = keras.random.normal(tf.shape(mean), seed=self.seeds)
        drawn = self.decoder(mean + tf.exp(0.5 * log_variance) * noise)
        return drawn, mean, log_variance

    def losses_of(self, images):
        """Returns the mean loss of images, and the part of it that is KL divergence."""
        drawn, mean, log_variance = self(images)
        error = tf.reduce_sum(
            keras.losses.binary_crossentropy(
                images[..., None], drawn[..., None], from_logits=True
            ),
            axis=1,
        )
        squares = tf.square(mean) + tf.exp(log_variance)
        divergence = 0.5 * tf.reduce_sum(squares - log_variance - 1, axis=1)
        return tf.reduce_mean(error + divergence), tf.reduce_mean(divergence)

    def train_step(self, images):
        with tf.GradientTape() as tape:
            loss, divergence = self.losses_of(images)
        gradients = tape.gradient(loss, self.trainable_weights)
        self.optimizer.apply(gradients, self.trainable_weights)
        return self.note(loss, divergence)

    def test_step(self, images):
        return self.note(*self.losses_of(images))

    def note(self, loss, divergence):
        """Returns the means so far."""
        self.loss_mean.update_state(loss)
        self.distance_mean.update_state(divergence)
        return {metric.name: metric.result() for metric in self.metrics}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=15)
    epochs = parser.parse_args().epochs

    keras.utils.set_random_seed(0)
    on_cluster = os.environ.get("TF_CONFIG")
    make = tf_psops.SwarmStrategy
    strategy = make() if on_cluster else make.in_process(2)
    images = (load_digits().data / 16).astype("float32")
    with strategy.scope():
        model = VariationalAutoencoder()
        model.compile(keras.optimizers.Adam(0.003))
    batch_size = 32 * strategy.num_replicas_in_sync
    verbose = 2 if strategy.is_chief else 0
    sync = tf_psops.PSOSync(10)
    model.fit(
        images, batch_size=batch_size, epochs=epochs, verbose=verbose, callbacks=[sync]
    )
    result = model.evaluate(images, batch_size=256, verbose=0, return_dict=True)
    if strategy.is_chief:
        print("agreed model:", {name: round(v, 2) for name, v in result.items()})
        drawn = tf.sigmoid(model.decoder(keras.random.normal([1, _LATENT], seed=3)))
        for row in drawn.numpy().reshape(8, 8):
            print("".join(" .:*#"[int(4.99 * shade)] * 2 for shade in row))


if __name__ == "__main__":
    main()
