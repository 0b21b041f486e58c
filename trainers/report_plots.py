"""The plots of `trainers.report`, as SVG that takes its colours from the page.

A plot is drawn in colours that stand for names, and in the SVG each of them becomes a
CSS variable, so that one picture serves light and dark pages.
"""

import io
import re
import xml.etree.ElementTree as ET
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import figure as mpl_figure
from matplotlib import ticker

NUM_COLOURS = 8
"""How many runs have a colour of their own; the next ones have dashed lines."""

_MOST_POINTS = 300
_MOST_LINES = 16
_SVG = "http://www.w3.org/2000/svg"

_COLOURS = {
    "ink": "#010101",
    "grid": "#020202",
    "start": "#030301",
    "steps": "#030302",
    "waiting": "#030303",
    "working": "#030304",
    "bad": "#030305",
    **{f"run-{i}": f"#0402{i:02x}" for i in range(NUM_COLOURS)},
}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.edgecolor": _COLOURS["grid"],
    "axes.labelcolor": _COLOURS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelsize": 10.5,
    "grid.color": _COLOURS["grid"],
    "grid.linewidth": 0.6,
    "xtick.color": _COLOURS["grid"],
    "ytick.color": _COLOURS["grid"],
    "xtick.labelcolor": _COLOURS["ink"],
    "ytick.labelcolor": _COLOURS["ink"],
    "text.color": _COLOURS["ink"],
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


class Plot(NamedTuple):
    """One plot.

    Attributes:
        key: A name for it, of letters and hyphens.
        title: What it shows.
        note: How to read it.
        svg: The picture, or an empty text if the runs do not have what it shows.
    """

    key: str
    title: str
    note: str
    svg: str


def learning(runs):
    """Returns the plots of how well the swarms learn."""
    scale = _Seconds(runs)
    plots = []
    for quantity, values, name, note in (
        ("loss", _loss, "Training loss", "The mean of all particles."),
        (
            "accuracy",
            lambda run: 100 * run.column("metrics/accuracy"),
            "Accuracy in percent",
            "Line: of the particles of the chief, in training. Star: of the agreed "
            "model at the end, on the test set.",
        ),
    ):
        for by, x in (("step", _steps), ("second", scale.of)):
            axes = _Axes("local step" if by == "step" else scale.label, name)
            for i, run in enumerate(runs):
                axes.line(i, x(run), values(run))
                accuracy = run.result.get("test_accuracy")
                if quantity == "accuracy" and accuracy is not None:
                    axes.star(i, x(run)[-1], 100 * accuracy)
            if quantity == "loss":
                axes.log_if_wide()
            title = f"{quantity.capitalize()} by {by}"
            plots.append(axes.plot(f"{quantity}-by-{by}", title, note))
    return plots


def particles(runs):
    """Returns plots of each run's particles as bands, on the same scales."""
    plots = []
    for name, label, title, what in (
        ("fitness", "Training loss", "Fitness", "Losses since the last one"),
        ("distances", "Distance", "Ways", "How far from where the swarm went on last"),
    ):
        tables = [run.table(name) for run in runs]
        known = np.concatenate([table[np.isfinite(table)] for table in tables])
        for i, (run, table) in enumerate(zip(runs, tables)):
            axes = _Axes("local step", label)
            x = _steps(run)
            axes.band(i, x, table)
            if run.num_particles <= _MOST_LINES:
                for column in table.T:
                    axes.line(i, x, column, width=0.7, alpha=0.55)
            axes.line(i, x, _mean(table))
            axes.scale_like(known)
            out = [record["step"] for record in run.records if record["diverged"]]
            note = (
                f"{what}, of {run.num_particles} particles: a thin line for each, the "
                "band from the least to the largest, the thick line for the mean."
            )
            if out:
                axes.marks(out)
                note += " Crosses: a particle was out of order."
            plots.append(axes.plot(f"{name}-{i}", f"{title} of {run.name}", note))
    return plots


def swarm(runs):
    """Returns the plots of how the swarms fly."""
    plots = []
    for name, values, label, title, note in (
        (
            "diversity",
            _diversity,
            "Spread / way",
            "Diversity",
            "Low where the particles fly together, high where each goes its own way. "
            "Of W particles, the root of (W - 1) / (W + 1) halves the inertia.",
        ),
        (
            "inertia",
            lambda run: run.column("measures/inertia"),
            "Inertia w",
            "Inertia",
            "How much of its last move the swarm makes again; 0 is averaging.",
        ),
        (
            "way",
            lambda run: run.column("measures/way"),
            "Distance",
            "Way of the centroid",
            "From where the swarm went on last.",
        ),
        (
            "spread",
            lambda run: run.column("measures/spread"),
            "Distance",
            "Spread of the particles",
            "Root mean square distance from their centroid.",
        ),
    ):
        axes = _Axes("local step", label)
        for i, run in enumerate(runs):
            axes.line(i, _steps(run), values(run))
        if name == "inertia":
            axes.from_zero()
        else:
            axes.log_if_wide()
        plots.append(axes.plot(name, title, note))
    return plots


def time(runs):
    """Returns the plots of where the time went, and what travelled."""
    scale = _Seconds(runs)
    parts = {
        "start": "until the first synchronisation",
        "steps": "local steps",
        "waiting": "waiting",
        "working": "synchronising",
    }
    axes = _Axes(scale.name, "", height=1 + 0.42 * len(runs))
    axes.bars(
        [run.name for run in runs],
        {
            _COLOURS[part]: [spent(run)[part] / scale.unit for run in runs]
            for part in parts
        },
    )
    plots = [
        axes.plot(
            "time",
            "Where the time went",
            "Waiting and synchronising as the chief saw them. Compilation comes before "
            "the first synchronisation.",
        )
    ]
    axes = _Axes("local step", "Percent of the time")
    for i, run in enumerate(runs):
        axes.line(i, *_shares(run))
    axes.from_zero()
    axes.level(20)
    plots.append(
        axes.plot(
            "share",
            "Share of the time in synchronisations",
            "Waiting included. Above the dashed line, a fifth, raise sync_every.",
        )
    )
    axes = _Axes("worker", "Percent of the time")
    most = max(len(record["waited"]) for run in runs for record in run.records)
    for i, run in enumerate(runs):
        axes.columns(i, len(runs), _waits(run, most))
    axes.from_zero()
    plots.append(
        axes.plot(
            "waits",
            "How long each worker waited",
            "The worker that waits least is the one that the others wait for.",
        )
    )
    axes = _Axes("local step", "Megabytes")
    for i, run in enumerate(runs):
        axes.line(i, _steps(run), np.cumsum(run.column("bytes")) / 1e6)
    axes.from_zero()
    plots.append(axes.plot("bytes", "Bytes moved to each particle", "From the start."))
    return plots


def members(runs):
    """Returns the plot of the workers that were there."""
    axes = _Axes("local step", "Workers")
    for i, run in enumerate(runs):
        counts = np.array([len(record["members"]) for record in run.records])
        axes.steps(i, _steps(run), counts)
    axes.from_zero(whole=True)
    note = "The workers that took part in each synchronisation."
    return [axes.plot("workers", "Workers", note)]


def spent(run):
    """Returns a dict of the seconds that a run spent in which part of its time."""
    waiting, working = (
        run.column(f"{what}_seconds").sum() for what in ("waiting", "working")
    )
    first = run.records[0]
    start = first["seconds"] - first["waiting_seconds"] - first["working_seconds"]
    start = max(start, 0.0) if first["sync"] == 0 else 0.0
    steps = max(run.training_seconds - start - waiting - working, 0.0)
    return {"start": start, "steps": steps, "waiting": waiting, "working": working}


def _steps(run):
    return run.column("step")


def _loss(run):
    return _mean(run.table("fitness"))


def _mean(table):
    """Returns the mean of each row's finite numbers, NaN where there is none."""
    known = np.isfinite(table)
    count = known.sum(axis=1)
    total = np.where(known, table, 0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _shares(run):
    """Returns steps, and the percentage of the time since the one before each."""
    spent = run.column("waiting_seconds") + run.column("working_seconds")
    seconds = np.diff(run.seconds, prepend=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = 100 * np.clip(spent / seconds, 0, 1)
    # Of the time before the first one compilers take the most.
    return _steps(run)[1:], shares[1:]


def _diversity(run):
    cohesion = run.column("measures/cohesion")
    return np.where(cohesion > 0, cohesion, np.nan) ** -0.5


def _waits(run, count):
    """Returns the percentage of the time that each worker waited, an array [count]."""
    table = np.zeros([len(run.records), count])
    for row, record in zip(table, run.records):
        waited = [seconds or 0.0 for seconds in record["waited"]]
        row[: len(waited)] = waited
    return 100 * table.sum(axis=0) / run.training_seconds


class _Seconds:
    """A unit of time for all runs."""

    def __init__(self, runs):
        longest = max(run.training_seconds for run in runs)
        self.unit, name = next(
            (unit, name)
            for least, unit, name in (
                (3 * 3600, 3600, "hours"),
                (300, 60, "minutes"),
                (0, 1, "seconds"),
            )
            if longest >= least
        )
        self.name = name
        self.label = f"{name} since the first synchronisation"

    def of(self, run):
        return (run.seconds - run.seconds[0]) / self.unit


class _Axes:
    """A figure of one pair of axes."""

    def __init__(self, x_label, y_label, height=2.8):
        with matplotlib.rc_context(_STYLE):
            self._figure = mpl_figure.Figure(
                figsize=(4.6, height), layout="constrained"
            )
            self._axes = self._figure.add_subplot()
        self._axes.set_xlabel(x_label)
        self._axes.set_ylabel(y_label)
        self._axes.tick_params(length=0)
        self._axes.margins(x=0.02)
        self._axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
        self._values = []

    def line(self, i, x, y, width=1.6, alpha=1.0):
        """Draws a line in the colour of run i."""
        x, y = _binned(x, y)
        if not np.isfinite(y).any():
            return
        self._values.append(y)
        (line,) = self._axes.plot(x, y, linewidth=width, alpha=alpha, **_look(i))
        if np.isfinite(y).sum() == 1:
            line.set(marker="o", markersize=4)

    def steps(self, i, x, y):
        """Draws a line that goes on until it jumps."""
        self._values.append(y)
        self._axes.step(x, y, where="post", **_look(i))
        self._axes.plot(x[-1:], y[-1:], marker="o", markersize=4, **_look(i))

    def band(self, i, x, table):
        """Draws the band between the least and the largest of each row."""
        known = np.isfinite(table)
        some = known.any(axis=1)
        if not some.any():
            return
        low = np.where(known, table, np.inf).min(axis=1)
        high = np.where(known, table, -np.inf).max(axis=1)
        low, high = (np.where(some, edge, np.nan) for edge in (low, high))
        middle, low = _binned(x, low)
        self._axes.fill_between(
            middle,
            low,
            _binned(x, high)[1],
            color=_look(i)["color"],
            alpha=0.18,
            linewidth=0,
        )

    def star(self, i, x, y):
        self._values.append(np.array([y]))
        self._axes.plot(
            [x],
            [y],
            marker="*",
            markersize=10,
            linestyle="",
            clip_on=False,
            color=_look(i)["color"],
            zorder=5,
        )

    def marks(self, x):
        """Draws crosses at the lower edge."""
        self._axes.plot(
            x,
            [0.02] * len(x),
            transform=self._axes.get_xaxis_transform(),
            marker="x",
            markersize=5,
            linestyle="",
            color=_COLOURS["bad"],
            zorder=5,
        )

    def level(self, y):
        """Draws a dashed line at a value."""
        if self._values:
            self._axes.axhline(
                y, color=_COLOURS["ink"], linestyle="--", linewidth=0.8, alpha=0.6
            )

    def bars(self, names, parts):
        """Draws a bar for each name, of parts behind each other."""
        left = np.zeros(len(names))
        places = -np.arange(len(names))
        for colour, lengths in parts.items():
            self._axes.barh(places, lengths, left=left, height=0.62, color=colour)
            left += lengths
        self._values.append(left)
        for label in self._axes.set_yticks(places, names):
            label.label1.set_parse_math(False)
        self._axes.grid(False, axis="y")

    def columns(self, i, count, heights):
        """Draws columns for run i of some, side by side with those of the others."""
        width = 0.8 / count
        places = np.arange(len(heights)) + (i - (count - 1) / 2) * width
        self._axes.bar(places, heights, width=0.9 * width, color=_look(i)["color"])
        self._axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True))
        self._axes.grid(False, axis="x")
        self._values.append(heights)

    def from_zero(self, whole=False):
        self._axes.set_ylim(bottom=0)
        if whole:
            top = max((values.max() for values in self._values), default=1)
            self._axes.set_ylim(0, top + 0.5)
            self._axes.yaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))

    def scale_like(self, values):
        """Makes the scale such that some values of several plots would fit."""
        if values.size:
            self.log_if_wide(values)
            self._axes.update_datalim(
                [(self._axes.dataLim.x0, v) for v in (values.min(), values.max())]
            )
            self._axes.autoscale_view()

    def log_if_wide(self, values=None):
        """Makes the scale logarithmic if the values are of several magnitudes."""
        if values is None:
            values = np.concatenate([np.ravel(v) for v in self._values] or [[]])
        values = values[np.isfinite(values)]
        if not values.size or values.min() <= 0 or values.max() < 20 * values.min():
            return
        self._axes.set_yscale("log")
        wide = values.max() > 3000 * values.min()
        self._axes.yaxis.set_major_locator(
            ticker.LogLocator(subs=[1] if wide else [1, 3], numticks=6)
        )
        self._axes.yaxis.set_major_formatter(
            ticker.FuncFormatter(lambda v, _: f"{v:g}")
        )
        self._axes.yaxis.set_minor_formatter(ticker.NullFormatter())

    def plot(self, key, title, note):
        """Returns the `Plot`."""
        svg = _svg(self._figure, key, title) if self._values else ""
        return Plot(key, title, note, svg)


def _look(i):
    dashes = ("-", "--", ":")[i // NUM_COLOURS % 3]
    return {"color": _COLOURS[f"run-{i % NUM_COLOURS}"], "linestyle": dashes}


def _binned(x, y):
    """Returns means of neighbours, so that there are not too many points to draw."""
    size = -(-len(x) // _MOST_POINTS)
    if size <= 1:
        return x, y
    groups = np.arange(len(x)) // size
    known = np.isfinite(y)
    count = np.bincount(groups, known)
    total = np.bincount(groups, np.where(known, y, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.bincount(groups, x) / np.bincount(groups), total / count


def _svg(figure, key, title):
    """Returns a figure as an element for a page, with names of its own."""
    file = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": key}):
        figure.savefig(file, format="svg", transparent=True, metadata=none)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ET.fromstring(file.getvalue())
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    for size in ("width", "height"):
        del root.attrib[size]
    root.attrib |= {"role": "img", "aria-label": title, "data-plot": key}
    text = ET.tostring(root, encoding="unicode")
    text = re.sub(r'id="', f'id="{key}-', text)
    text = re.sub(r"url\(#", f"url(#{key}-", text)
    text = re.sub(r'href="#', f'href="#{key}-', text)
    for name, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    return re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
