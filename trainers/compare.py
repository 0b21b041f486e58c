r"""Compares synchronisation rules on equal work.

```bash
python -m trainers.compare --dataset=mnist --model=lenet \
    --methods=ssgd,average,slowmo,pso --intervals=10,50 \
    --partition=full,iid,label --seeds=3 --epochs=2 --output_dir=runs/mnist
```

All methods train the same network from the same weights on the same batches. The
folder, `runs/compare` by default, gets `results.json` (one record for each run),
`results.md` (tables) and the plots. A call that is interrupted goes on where it was
when it is repeated.

A method can have arguments, of its rule or of `PSOSync`:
`--methods="pso,pso(inertia=0.3),slowmo(inertia=0.3)"`.

Text, `--dataset=python_source --model=transformer --optimizer=adamw --steps=300`, is
compared in bits per byte; there the partition `label` gives each particle packages of
its own.

With several `--learning_rates` each method gets its own best for each interval and
partition, chosen on a tenth of the training set (of text, of its files) that is held
out for it, by the mean over the same seeds. With `--held_out` the comparison itself
takes that tenth in place of the test set: to choose the constants of a rule.
"""

import collections
import itertools
import json
import math
import os
import pathlib
import statistics

import tensorflow as tf
import tqdm
from absl import app, flags, logging

from trainers import common_flags, comparison, comparison_report, datasets, measures
from trainers.files import make_folder, write_text

_METHODS = flags.DEFINE_string(
    "methods",
    "average,pso",
    f"Methods: {', '.join(comparison.METHODS)}, with arguments as in pso(inertia=0.3).",
)
_INTERVALS = flags.DEFINE_list("intervals", ["10"], "Synchronisation intervals.")
_PARTITION = flags.DEFINE_list(
    "partition", ["full"], f"Partitions: {', '.join(datasets.PARTITIONS)}."
)
_SHARDS = flags.DEFINE_integer(
    "shards_per_worker", 2, "Label shards of each particle.", lower_bound=1
)
_LEARNING_RATES = flags.DEFINE_list("learning_rates", ["0.05"], "Learning rates.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds, from 0.", lower_bound=1)
_HELD_OUT = flags.DEFINE_bool(
    "held_out", False, "Test on a held-out tenth of the training set, not the test set."
)
_FLAGS = (
    common_flags.DATASET,
    common_flags.DATA_DIR,
    common_flags.MODEL,
    _METHODS,
    _INTERVALS,
    _PARTITION,
    _SHARDS,
    _LEARNING_RATES,
    common_flags.PARTICLES,
    common_flags.BATCH_SIZE,
    common_flags.EPOCHS,
    common_flags.STEPS,
    common_flags.OPTIMIZER,
    common_flags.WEIGHT_DECAY,
    common_flags.CLIPNORM,
    _SEEDS,
    _HELD_OUT,
    common_flags.OUTPUT_DIR,
)


@flags.validator("methods")
def _are_methods(text):
    try:
        return bool(comparison.parse_methods(text))
    except ValueError as error:
        raise flags.ValidationError(str(error)) from error


flags.register_validator(
    "partition",
    lambda names: names and set(names) <= set(datasets.PARTITIONS),
    message=f"Expected some of {datasets.PARTITIONS}, separated by commas.",
)
flags.register_validator(
    "intervals",
    lambda texts: texts and all(t.isdigit() and int(t) > 0 for t in texts),
    message="Expected whole numbers of at least 1, separated by commas.",
)


@flags.validator("learning_rates", message="Expected numbers above 0, with commas.")
def _are_rates(texts):
    try:
        return bool(texts) and all(0 < float(text) < math.inf for text in texts)
    except ValueError:
        return False


def compare(
    settings,
    methods,
    intervals,
    partitions,
    learning_rates,
    seeds,
    output_dir,
    data_dir=None,
    held_out=False,
):
    """Runs a comparison, as far as it is not done yet, and writes its results.

    Args:
        settings: The arguments of `comparison.Comparison` but `data_dir`, as a dict.
        methods: Methods, as from `comparison.parse_methods`.
        intervals: Synchronisation intervals, ints.
        partitions: Names out of `datasets.PARTITIONS`.
        learning_rates: Learning rates; of several, each method gets its own best.
        seeds: The number of seeds.
        output_dir: A `pathlib.Path` of a folder.
        data_dir: Folder of TensorFlow Datasets. Defaults to its own default.
        held_out: Whether a held-out tenth of the training set takes the place of the
            test set. Defaults to `False`.

    Returns:
        The number of cells that failed.

    Raises:
        ValueError: If the folder holds results of other settings.

    Example:

    ```python
    settings = {
        "dataset": "digits", "model": "lenet", "particles": 8, "batch_size": 32,
        "epochs": 2, "shards_per_worker": 2,
    }
    folder = pathlib.Path("runs/digits")
    compare(settings, ["average", "pso"], [10], ["full"], [0.05], 3, folder)
    ```
    """
    places = list(
        dict.fromkeys(
            (method, comparison.interval_of(method, interval), partition)
            for method, interval, partition in itertools.product(
                methods, intervals, partitions
            )
        )
    )
    runner = comparison.Runner(settings, output_dir / "results.json", data_dir)
    rates = {place: learning_rates[0] for place in places}
    if len(learning_rates) > 1:
        tuning = [
            comparison.Cell(*place, rate, seed, held_out=True)
            for place in places
            for rate in learning_rates
            for seed in range(seeds)
        ]
        rates = _best_rates(_run(runner, tuning, "choosing learning rates"))
    cells = [
        comparison.Cell(*place, rates[place], seed, held_out)
        for place in places
        if place in rates
        for seed in range(seeds)
    ]
    records = _run(runner, cells, "comparing")
    if records:
        table = (
            comparison_report.markdown(records)
            + "\n"
            + comparison_report.costs(records)
        )
        if len(learning_rates) > 1:
            table += "\n" + comparison_report.learning_rates(records)
        write_text(output_dir / "results.md", table)
        comparison_report.plot_all(records, output_dir)
        print(table)
    return runner.num_failed


def _run(runner, cells, title):
    """Returns the records of all cells that do not fail, behind a progress bar."""
    records = []
    with tqdm.tqdm(cells, desc=title, unit="run") as progress:
        for cell in progress:
            record = runner.run(cell, report=progress.write)
            if record is not None:
                records.append(record)
    return records


def _best_rates(records):
    """Returns the learning rate of the best results at each place."""
    results = collections.defaultdict(lambda: collections.defaultdict(list))
    measure = measures.of_records(records)
    for record in records:
        place = (record["method"], record["interval"], record["partition"])
        results[place][record["learning_rate"]].append(measure.of(record))
    best = {}
    for place, by_rate in results.items():
        # A rate that fails with some seeds must not be judged by the others.
        most = max(map(len, by_rate.values()))
        means = {
            rate: statistics.mean(runs)
            for rate, runs in by_rate.items()
            if len(runs) == most
        }
        best[place] = measure.best(means, key=means.get)
    return best


def main(argv):
    """Runs the comparison that the flags describe."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {argv[1:]}. Expected flags only.")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        tf.get_logger().setLevel("WARNING")
    output_dir = pathlib.Path(common_flags.OUTPUT_DIR.value or "runs/compare")
    make_folder(output_dir)
    arguments = {flag.name: flag.value for flag in _FLAGS}
    write_text(output_dir / "flags.json", json.dumps(arguments, indent=2) + os.linesep)

    settings = {
        "dataset": common_flags.DATASET.value,
        "model": common_flags.MODEL.value,
        "particles": common_flags.PARTICLES.value or 8,
        "batch_size": common_flags.BATCH_SIZE.value,
        "epochs": common_flags.EPOCHS.value,
        "shards_per_worker": _SHARDS.value,
        "steps": common_flags.STEPS.value,
        "optimizer": common_flags.OPTIMIZER.value,
        "weight_decay": common_flags.WEIGHT_DECAY.value,
        "clipnorm": common_flags.CLIPNORM.value,
    }
    num_failed = compare(
        settings,
        comparison.parse_methods(_METHODS.value),
        [int(interval) for interval in _INTERVALS.value],
        _PARTITION.value,
        [float(rate) for rate in _LEARNING_RATES.value],
        _SEEDS.value,
        output_dir,
        common_flags.DATA_DIR.value,
        _HELD_OUT.value,
    )
    return 1 if num_failed else 0


if __name__ == "__main__":
    app.run(main)
