"""Tables and plots of a comparison's records."""

import collections
import itertools
import math
import statistics

import matplotlib
import numpy as np

matplotlib.use("Agg")  # Files only: no display is needed.

from matplotlib import pyplot as plt  # noqa: E402

from trainers import comparison, measures  # noqa: E402

# Okabe & Ito's colours, which colour-blind readers can tell apart, and markers.
_STYLES = {
    "pso": ("#0072B2", "o"),
    "average": ("#D55E00", "s"),
    "slowmo": ("#009E73", "^"),
    "diloco": ("#56B4E9", "p"),
    "easgd": ("#CC79A7", "D"),
    "pso_paper": ("#E69F00", "X"),
    "ssgd": ("#000000", "*"),
    "local": ("#999999", "P"),
}
_MARKERS = "v<>dh8Hx+1234"  # Of methods with arguments.
_WITH_OUTER_MOMENTUM = ("slowmo", "diloco")
_MBIT = 100  # Of the slow network's lines, in a second.


def markdown(records):
    """Writes how well the methods have ended as Markdown tables.

    Args:
        records: A list of records of `comparison.Comparison.run`.

    Returns:
        A table of mean +- standard error, the best of each column in bold, and tables
        of each method's difference, paired by seed, from "average" and from the best,
        in each column, of the methods with outer momentum.
    """
    measure = measures.of_records(records)
    cells = _by_cell(records)
    methods = _methods(records)
    columns = _columns(records)
    seeds = {len(runs) for runs in cells.values()}
    texts = {method: [] for method in methods}
    lines = [
        f"{_kind(records)} {measure.name}, mean ± standard error over {_range(seeds)} "
        f"seeds.{_partitions(records)}",
        "",
        *_head(columns),
    ]
    for column in columns:
        stands = {
            method: [
                measure.of(run)
                for run in cells.get((method, *_place(method, column)), {}).values()
            ]
            for method in methods
        }
        means = [statistics.mean(values) for values in stands.values() if values]
        best = measure.best(means, key=float)
        for method, values in stands.items():
            text = ""
            if values:
                mean = statistics.mean(values)
                text = measure.text(mean) + _with(_standard_error(values), measure)
                text = f"**{text}**" if mean == best else text
            texts[method].append(text)
    lines += [_row(method, texts[method]) for method in methods]
    outer = [m for m in methods if comparison.name_of(m) in _WITH_OUTER_MOMENTUM]
    for peers in ["average"] if "average" in methods else [], outer:
        others = [method for method in methods if method not in peers]
        if peers and others:
            lines += ["", *_differences(cells, others, columns, peers, measure)]
    return "\n".join(lines) + "\n"


def costs(records):
    """Returns a Markdown table of what the synchronisations of each method cost."""
    lines = [
        "Megabytes moved to each worker, and the share of the wall time that was spent "
        "in synchronisations.",
        "",
        *_head(_columns(records)),
    ]
    cells = _by_cell(records)
    for method in _methods(records):
        texts = []
        for column in _columns(records):
            runs = cells.get((method, *_place(method, column)), {}).values()
            text = ""
            if runs:
                moved = statistics.mean(run["bytes_per_worker"] for run in runs) / 1e6
                text = f"{moved:.1f} MB"
            shares = [
                100 * run["sync_seconds"] / run["seconds"]
                for run in runs
                if run["sync_seconds"] is not None
            ]
            if shares:
                text += f", {statistics.median(shares):.0f} %"
            texts.append(text)
        lines.append(_row(method, texts))
    return "\n".join(lines) + "\n"


def learning_rates(records):
    """Returns a Markdown table of the learning rate of each run's place."""
    columns = _columns(records)
    cells = _by_cell(records)
    lines = ["Learning rates, chosen on held-out training data.", "", *_head(columns)]
    for method in _methods(records):
        runs = [cells.get((method, *_place(method, column)), {}) for column in columns]
        rates = [{f"{r['learning_rate']:g}" for r in run.values()} for run in runs]
        lines.append(_row(method, [", ".join(sorted(rate)) for rate in rates]))
    return "\n".join(lines) + "\n"


def plot_all(records, folder):
    """Draws the plots of a comparison into PNG files.

    Args:
        records: A list of records of `comparison.Comparison.run`.
        folder: A `pathlib.Path`.
    """
    name = measures.of_records(records).file
    _plot_costs(records, folder / f"{name}_by_cost.png")
    _plot_loss(records, folder / "loss_by_step.png")


def _differences(cells, methods, columns, peers, measure):
    """Returns the table of differences from the best of some peers in each column."""
    name = f"`{peers[0]}`"
    if len(peers) > 1:
        name = f"the best in each column of {', '.join(f'`{p}`' for p in peers)},"
    lines = [
        f"Difference from {name} in {measure.unit}, paired by seed, ± standard error; "
        "then the mean over the cells, and the mean of each cell's difference divided "
        "by its own error.",
        "",
        *_head(columns, "all cells", "in errors"),
    ]
    best = [_best(cells, peers, column, measure) for column in columns]
    for method in methods:
        texts, means, errors = [], [], []
        for column, peer in zip(columns, best):
            runs = cells.get((method, *_place(method, column)), {})
            pairs = [
                measure.of(run) - measure.of(peer[seed])
                for seed, run in runs.items()
                if seed in peer
            ]
            if not pairs:
                texts.append("")
                continue
            means.append(statistics.mean(pairs))
            errors.append(_standard_error(pairs))
            text = measure.text(means[-1], "+") + _with(errors[-1], measure)
            texts.append(text)
        if means:
            error = math.hypot(*errors) / len(errors)
            mean = measure.text(statistics.mean(means), "+")
            texts.append(mean + _with(error, measure))
            known = error > 0 and all(errors)
            ratios = [m / e for m, e in zip(means, errors)] if known else []
            texts.append(f"{statistics.mean(ratios):+.1f}" if ratios else "")
        lines.append(_row(method, texts))
    return lines


def _best(cells, methods, column, measure):
    """Returns the runs by seed of that of some methods which is best in a column."""
    there = [cells.get((method, *_place(method, column)), {}) for method in methods]
    return measure.best(
        [runs for runs in there if runs] or [{}],
        key=lambda runs: statistics.mean(map(measure.of, runs.values())) if runs else 0,
    )


def _plot_costs(records, path):
    """Draws how good the methods are against bytes, and time on a slow network."""
    measure = measures.of_records(records)
    cells = _by_cell(records)
    styles = _styles(records)
    partitions = list(dict.fromkeys(r["partition"] for r in records))
    figure, axes = _panels(2, len(partitions))
    step = min(_step_seconds(record) for record in records)
    costs_of = {
        "MB moved to each worker": lambda r: r["bytes_per_worker"] / 1e6,
        f"seconds at {_MBIT} Mbit/s": lambda r: _seconds_on_line(r, step),
    }
    for row, (label, cost) in zip(axes, costs_of.items()):
        for axis, partition in zip(row, partitions):
            for method in _methods(records):
                keys = sorted(k for k in cells if k[0] == method and k[2] == partition)
                runs = [list(cells[key].values()) for key in keys]
                if not runs or method == "local":  # It moves no bytes.
                    continue
                values = [[measure.of(run) for run in group] for group in runs]
                axis.errorbar(
                    [statistics.median(map(cost, group)) for group in runs],
                    [statistics.mean(v) for v in values],
                    yerr=np.nan_to_num([_standard_error(v) for v in values]),
                    capsize=2,
                    label=method,
                    **styles[method],
                )
            axis.set_xscale("log", subs=[2, 5])
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_formatter("{x:g}")
            axis.set_title(f"partition: {partition}")
            axis.set_xlabel(label)
            axis.set_ylabel(f"{_kind(records).lower()} {measure.name}")
    _save(figure, axes, path)


def _step_seconds(record):
    """Returns what a local step of one particle takes, from a run of all of them."""
    working = record["seconds"] - (record["sync_seconds"] or 0)
    return working / record["steps"] / record["settings"]["particles"]


def _seconds_on_line(record, step):
    """Returns what a run would take if each particle had this machine to itself.

    An all-reduce brings each of W workers 2 (W - 1) / W times the vector.

    Args:
        record: A record of `comparison.Comparison.run`.
        step: Seconds of a local step.
    """
    workers = record["settings"]["particles"]
    moved = 2 * (workers - 1) / workers * record["bytes_per_worker"]
    settling = (record["sync_seconds"] or 0) / workers
    return record["steps"] * step + settling + 8e-6 * moved / _MBIT


def _plot_loss(records, path):
    columns = _columns(records)
    partitions = list(dict.fromkeys(partition for partition, _ in columns))
    intervals = list(dict.fromkeys(n for _, n in columns))
    cells = _by_cell(records)
    styles = _styles(records)
    figure, axes = _panels(len(partitions), len(intervals))
    for i, partition in enumerate(partitions):
        for j, interval in enumerate(intervals):
            axis = axes[i][j]
            for method in _methods(records):
                runs = cells.get((method, *_place(method, (partition, interval))))
                if not runs:
                    continue
                curves = np.array([run["curve"] for run in runs.values()])
                steps, losses = curves[0, :, 0], curves[:, :, 1]
                mean = losses.mean(axis=0)
                error = losses.std(axis=0, ddof=min(1, len(losses) - 1))
                error /= math.sqrt(len(losses))
                axis.plot(steps, mean, markevery=10, label=method, **styles[method])
                axis.fill_between(
                    steps,
                    mean - error,
                    mean + error,
                    color=styles[method]["color"],
                    alpha=0.2,
                )
            axis.set_yscale("log")
            axis.set_title(f"partition: {partition}, interval: {interval}")
            axis.set_xlabel("local step")
            axis.set_ylabel("training loss")
    _save(figure, axes, path)


def _panels(rows, columns):
    return plt.subplots(
        rows,
        columns,
        figsize=(5 * columns, 4 * rows),
        squeeze=False,
        layout="constrained",
    )


def _save(figure, axes, path):
    labels = {}
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        handles, names = axis.get_legend_handles_labels()
        labels.update(zip(names, handles))
    figure.legend(
        labels.values(), labels.keys(), loc="outside lower center", ncols=len(labels)
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _by_cell(records):
    """Returns {(method, interval, partition): {seed: record}}."""
    cells = collections.defaultdict(dict)
    for record in records:
        key = (record["method"], record["interval"], record["partition"])
        cells[key][record["seed"]] = record
    return dict(cells)


def _methods(records):
    order = list(_STYLES)
    return sorted(
        {record["method"] for record in records},
        key=lambda method: (order.index(comparison.name_of(method)), method),
    )


def _styles(records):
    """Returns how the lines of each method look: a colour for each name."""
    markers = itertools.cycle(_MARKERS)
    styles = {}
    for method in _methods(records):
        color, marker = _STYLES[comparison.name_of(method)]
        plain = method in _STYLES
        styles[method] = {
            "color": color,
            "marker": marker if plain else next(markers),
            "linestyle": "-" if plain else ":",
        }
    return styles


def _columns(records):
    """Returns the (partition, interval) of the methods that have an interval."""
    places = [
        (r["partition"], r["interval"])
        for r in records
        if r["method"] not in ("local", "ssgd")
    ] or [(r["partition"], r["interval"]) for r in records]
    order = list(dict.fromkeys(partition for partition, _ in places))
    return sorted(set(places), key=lambda place: (order.index(place[0]), place[1]))


def _place(method, column):
    """Returns the (interval, partition) at which a method stands in a column."""
    partition, interval = column
    return comparison.interval_of(method, interval), partition


def _kind(records):
    return "Held-out" if records[0]["held_out"] else "Test"


def _partitions(records):
    """Returns what a caption has to say about the partitions."""
    if measures.of_records(records) is measures.BITS and any(
        record["partition"] == "label" for record in records
    ):
        return " `label`: each particle has packages of its own."
    return ""


def _with(error, measure):
    return "" if math.isnan(error) else f" ± {measure.text(error)}"


def _standard_error(values):
    """Returns the standard error of the mean of some values, NaN of a single one."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def _range(numbers):
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"


def _head(columns, *more):
    names = [*(f"{partition}, n={n}" for partition, n in columns), *more]
    return [_row("method", names), _row("---", ["---:"] * len(names))]


def _row(first, rest):
    return "| " + " | ".join([first, *rest]) + " |"
