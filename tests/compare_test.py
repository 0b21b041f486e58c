"""Tests of `trainers.compare`: equal work, resuming, tables and plots."""

import json
import math
import pathlib
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from absl import flags
from absl.testing import flagsaver, parameterized

import tf_psops
from trainers import compare, comparison, comparison_report, datasets

_SETTINGS = {
    "dataset": "digits",
    "model": "mlp",
    "particles": 2,
    "batch_size": 32,
    "epochs": 1,
    "shards_per_worker": 2,
}
_FILES = (
    "results.md",
    "accuracy_by_cost.png",
    "loss_by_step.png",
)


def _record(method, interval, seed, accuracy):
    return {
        **comparison.Cell(method, interval, "full", 0.1, seed)._asdict(),
        "test_accuracy": accuracy,
        "bytes_per_worker": 100.0,
        "curve": [[1, 2.0], [2, 1.0]],
        "steps": 2,
        "settings": {"particles": 2},
        "seconds": 2.0,
        "sync_seconds": None if method == "local" else 0.5,
    }


class CompareTest(tf.test.TestCase, parameterized.TestCase):
    def test_runs_writes_and_goes_on_where_it_was(self):
        folder = pathlib.Path(self.get_temp_dir())
        methods = ["average", "pso", "ssgd", "local"]

        def run(seeds):
            return compare.compare(
                _SETTINGS, methods, [4, 10], ["full"], [0.1], seeds, folder
            )

        self.assertEqual(run(seeds=1), 0)
        for name in _FILES:
            self.assertGreater((folder / name).stat().st_size, 100, name)
        records = json.loads((folder / "results.json").read_text())
        by_place = {(r["method"], r["interval"]): r for r in records}
        self.assertCountEqual(
            by_place,
            [("average", 4), ("average", 10), ("pso", 4), ("pso", 10)]
            + [("ssgd", 1), ("local", 0)],
        )
        steps = 1437 // 64
        weights = 4 * (64 * 128 + 128 + 128 * 10 + 10)
        for (method, interval), record in by_place.items():
            syncs = {0: 0, 1: steps}.get(interval, math.ceil(steps / (interval or 1)))
            self.assertEqual(record["syncs"], syncs, (method, interval))
            self.assertEqual(record["steps"], steps)
            scalars = 300 * syncs
            moved = record["bytes_per_worker"]
            self.assertBetween(moved, syncs * weights, syncs * weights + scalars)
            self.assertEqual([step for step, _ in record["curve"]], [*range(1, 23)])
        # The same weights and batches for all: the first losses are equal.
        first = {record["curve"][0][1] for record in records}
        self.assertLen({round(loss, 5) for loss in first}, 1)
        self.assertGreater(
            by_place["average", 4]["test_accuracy"],
            by_place["local", 0]["test_accuracy"],
        )

        with mock.patch.object(comparison.Comparison, "run") as rerun:
            self.assertEqual(run(seeds=1), 0)
            rerun.assert_not_called()
            rerun.side_effect = ValueError("broken")
            self.assertEqual(run(seeds=2), 6)
            self.assertEqual(rerun.call_count, 6)
        self.assertLen(json.loads((folder / "results.json").read_text()), 6)
        with self.assertRaisesRegex(ValueError, "other settings|Choose another"):
            comparison.Runner({**_SETTINGS, "epochs": 2}, folder / "results.json")

    def test_a_cell_repeats_bit_for_bit_after_another(self):
        swarm = comparison.Comparison(**_SETTINGS)
        cell = comparison.Cell("pso", 5, "label", 0.1, seed=1)
        first = swarm.run(cell)
        swarm.run(cell._replace(seed=2, partition="iid"))
        again = swarm.run(cell)
        for name in ("test_loss", "test_accuracy", "curve", "syncs"):
            self.assertEqual(again[name], first[name])

    def test_learning_rates_are_chosen_on_held_out_training_data(self):
        data = datasets.load("digits")
        held_out = comparison.Comparison(**_SETTINGS)._data[True]
        images = {image.tobytes() for image in held_out.test_images}
        images |= {image.tobytes() for image in held_out.train_images}
        self.assertEqual(images, {image.tobytes() for image in data.train_images})
        self.assertLen(held_out.test_labels, 144)

        def run(_, cell):
            # The test set likes 0.1 best, the held-out examples 0.2.
            liked = 0.2 if cell.held_out else 0.1
            accuracy = 0.9 - abs(cell.learning_rate - liked)
            return _record(*cell[:2], cell.seed, accuracy) | cell._asdict()

        folder = pathlib.Path(self.get_temp_dir())
        with mock.patch.object(comparison.Comparison, "run", run):
            compare.compare(
                _SETTINGS, ["average"], [5], ["full"], [0.1, 0.2, 0.4], 2, folder
            )
        records = json.loads((folder / "results.json").read_text())
        final = [r["learning_rate"] for r in records if not r["held_out"]]
        self.assertEqual(final, [0.2, 0.2])
        self.assertIn("| average | 0.2 |", (folder / "results.md").read_text())

    def test_held_out_comparison_leaves_the_test_set_alone(self):
        def run(_, cell):
            return _record(*cell[:2], cell.seed, 0.9) | cell._asdict()

        folder = pathlib.Path(self.get_temp_dir())
        with mock.patch.object(comparison.Comparison, "run", run):
            compare.compare(
                *(_SETTINGS, ["average"], [5], ["full"], [0.1, 0.2], 2, folder),
                held_out=True,
            )
        records = json.loads((folder / "results.json").read_text())
        self.assertTrue(all(record["held_out"] for record in records))
        self.assertStartsWith((folder / "results.md").read_text(), "Held-out accuracy")

    def test_text_is_compared_in_bits(self):
        folder = pathlib.Path(self.get_temp_dir())
        settings = {
            **_SETTINGS,
            **{"dataset": "python_source", "model": "transformer", "steps": 6},
            **{"optimizer": "adamw", "weight_decay": 0.1, "clipnorm": 1.0},
            "batch_size": 4,
        }
        methods, rates = ["average"], [0.003, 1e-6]
        num_failed = compare.compare(
            settings, methods, [3], ["label"], rates, 1, folder, held_out=True
        )
        self.assertEqual(num_failed, 0)
        records = json.loads((folder / "results.json").read_text())
        self.assertLen(records, 2)
        for record in records:
            self.assertTrue(record["held_out"])
            self.assertEqual(record["steps"], 6)
            bits = record["test_loss"] / math.log(2)
            self.assertAllClose(record["test_bits"], bits)
            self.assertBetween(bits, 4, 9)
        table = (folder / "results.md").read_text()
        self.assertStartsWith(table, "Held-out bits per byte (lower is better), mean")
        self.assertIn("`label`: each particle has packages of its own.", table)
        self.assertIn("| average | 0.003 |", table)
        for name in "bits_by_cost.png", "loss_by_step.png":
            self.assertGreater((folder / name).stat().st_size, 100, name)

    @parameterized.parameters(
        ("--methods=average,gossip", "methods.*'gossip'.*'average'"),
        ("--methods=", "methods"),
        ("--methods=pso(", "methods"),
        ("--methods=pso((0.5,))", "methods.*by name"),
        ("--methods=pso(inertia=-1)", "methods.*`inertia`"),
        ("--methods=pso(speed=1)", "methods.*speed"),
        ("--methods=ssgd(inertia=2)", "methods.*of a rule"),
        ("--intervals=0", "intervals"),
        ("--intervals=ten", "intervals"),
        ("--partition=full,half", "partition"),
        ("--learning_rates=0.1,-1", "learning_rates"),
        ("--learning_rates=fast", "learning_rates"),
        ("--seeds=0", "seeds"),
        ("--steps=0", "steps"),
        ("--optimizer=lion", "optimizer"),
        ("--weight_decay=-1", "weight_decay"),
        ("--weight_decay=nan", "weight_decay"),
        ("--clipnorm=0", "clipnorm"),
        ("--dataset=python_source", "dataset.*lenet.*Expected one of transformer"),
        ("--model=transformer", "dataset.*digits.*Expected one of mlp, lenet"),
    )
    def test_refuses_flag(self, argument, name):
        with (
            flagsaver.flagsaver(),
            self.assertRaisesRegex(flags.IllegalFlagValueError, name),
        ):
            flags.FLAGS(["compare", argument])


class CostsTest(tf.test.TestCase):
    def test_table_by_hand(self):
        table = comparison_report.costs(
            [_record("pso", 10, 0, 0.9), _record("local", 0, 0, 0.9)]
        )
        self.assertIn("| method | full, n=10 |", table)
        self.assertIn("| pso | 0.0 MB, 25 % |", table)
        self.assertIn("| local | 0.0 MB |", table)


class MethodsTest(tf.test.TestCase):
    def test_arguments_reach_the_rule_and_the_callback(self):
        text = "ssgd, pso( inertia=.25,delay=3), average(optimizer_slots='average')"
        methods = comparison.parse_methods(text)
        self.assertEqual(
            methods,
            ["ssgd", "pso(inertia=0.25, delay=3)"]
            + ["average(optimizer_slots='average')"],
        )
        ssgd, pso, average = map(comparison.make_sync, methods)
        self.assertIsNone(ssgd)
        self.assertEqual(pso.rule.inertia, 0.25)
        self.assertEqual((pso.optimizer_slots, pso.delay), ("local", 3))
        with self.assertRaisesRegex(ValueError, "delay=3"):
            comparison.make_sync(methods[1], 3)
        self.assertIsInstance(average.rule, tf_psops.ParameterAverage)
        self.assertEqual(average.optimizer_slots, "average")


class ReportTest(tf.test.TestCase):
    def test_plots_tell_the_variants_of_a_method_apart(self):
        methods = ["pso", "pso(inertia=0)", "pso(inertia=0.9)", "average"]
        records = [_record(method, 10, 0, 0.9) for method in methods]
        styles = comparison_report._styles(records)
        self.assertCountEqual(styles, methods)
        self.assertLen({style["marker"] for style in styles.values()}, 4)

    def test_table_by_hand(self):
        records = [
            _record("average", 10, 0, 0.90),
            _record("average", 10, 1, 0.92),
            _record("pso", 10, 0, 0.93),
            _record("pso", 10, 1, 0.93),
        ]
        table = comparison_report.markdown(records)
        # Of .90 and .92 the standard deviation is sqrt(2) points, the error 1.
        self.assertIn("| average | 91.00 ± 1.00 |", table)
        self.assertIn("| pso | **93.00 ± 0.00** |", table)
        self.assertIn("| pso | +2.00 ± 1.00 | +2.00 ± 1.00 | +2.0 |", table)
        self.assertIn("over 2 seeds", table)

    def test_lower_bits_are_better(self):
        records = [
            {**_record(method, 10, seed, 0.5), "test_bits": bits}
            for method, runs in {"average": (3.5, 3.6), "pso": (3.4, 3.54)}.items()
            for seed, bits in enumerate(runs)
        ]
        table = comparison_report.markdown(records)
        self.assertStartsWith(table, "Test bits per byte (lower is better), mean")
        self.assertIn("| average | 3.550 ± 0.050 |", table)
        self.assertIn("| pso | **3.470 ± 0.070** |", table)
        self.assertIn("| pso | -0.080 ± 0.020 | -0.080 ± 0.020 | -4.0 |", table)
        self.assertIn("Difference from `average` in bits per byte", table)

    def test_differences_from_the_better_peer_of_each_column(self):
        stands = {
            ("slowmo", 10): (0.90, 0.92),
            ("slowmo", 50): (0.80, 0.82),
            ("diloco", 10): (0.70, 0.72),
            ("diloco", 50): (0.85, 0.85),
            ("pso", 10): (0.91, 0.94),
            ("pso", 50): (0.84, 0.86),
        }
        table = comparison_report.markdown(
            [
                _record(*place, seed, accuracy)
                for place, runs in stands.items()
                for seed, accuracy in enumerate(runs)
            ]
        )
        self.assertIn("from the best in each column of `slowmo`, `diloco`,", table)
        self.assertIn(
            "| pso | +1.50 ± 0.50 | +0.00 ± 1.00 | +0.75 ± 0.56 | +1.5", table
        )

    def test_seconds_on_a_slow_line(self):
        record = {
            "steps": 10,
            "syncs": 2,
            "bytes_per_worker": 10**6,
            "seconds": 5.0,
            "sync_seconds": 1.0,
            "settings": {"particles": 4},
        }
        step = comparison_report._step_seconds(record)
        self.assertAlmostEqual(step, 0.1)
        # 1.5 MB at 12.5 MB a second, and a quarter of a second to move one particle.
        seconds = comparison_report._seconds_on_line(record, step)
        self.assertAlmostEqual(seconds, 1 + 0.25 + 0.12)

    def test_not_a_number_is_never_the_best(self):
        records = [
            {**_record("pso", 10, 0, 0.5), "learning_rate": rate, "test_bits": bits}
            for rate, bits in ((0.1, math.nan), (0.2, 3.0), (0.3, 4.0))
        ]
        self.assertEqual(compare._best_rates(records), {("pso", 10, "full"): 0.2})

    def test_rate_that_fails_with_some_seeds_is_not_the_best(self):
        runs = [(0.1, 0, 0.5), (0.1, 1, 0.6), (0.2, 1, 0.9)]
        records = [
            {**_record("pso", 10, seed, accuracy), "learning_rate": rate}
            for rate, seed, accuracy in runs
        ]
        self.assertEqual(compare._best_rates(records), {("pso", 10, "full"): 0.1})

    def test_one_seed_has_no_standard_error(self):
        records = [_record("average", 10, 0, 0.90), _record("pso", 10, 0, 0.93)]
        table = comparison_report.markdown(records)
        self.assertIn("| average | 90.00 |", table)
        self.assertIn("| pso | **93.00** |", table)
        self.assertIn("| pso | +3.00 | +3.00 |  |", table)


class ShareGradientsTest(tf.test.TestCase):
    def test_is_synchronous_sgd(self):
        data = datasets.load("digits")
        dataset = datasets.train_dataset(
            data, num_particles=3, batch_size=8, epochs=1, seed=0
        ).take(6)

        def fit(strategy):
            with strategy.scope():
                layers = [keras.layers.Flatten(), keras.layers.Dense(10)]
                model = keras.Sequential([keras.layers.Input([8, 8, 1]), *layers])
                loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
                model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
            model.set_weights([np.zeros([64, 10]), np.zeros(10)])
            model.fit(dataset, verbose=0)
            return model

        strategy = tf_psops.SwarmStrategy.in_process(3, share_gradients=True)
        model = fit(strategy)
        plain = fit(tf.distribute.get_strategy())
        for variable, expected in zip(model.trainable_variables, plain.get_weights()):
            for copy in strategy.experimental_local_results(variable.value):
                self.assertAllClose(copy, expected, rtol=0, atol=1e-6)


if __name__ == "__main__":
    tf.test.main()
