"""Tests of `trainers.report`: what the page has, and how a browser shows it."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
from absl import flags
from absl.testing import absltest, flagsaver, parameterized
from PIL import Image

from trainers import files, report, report_plots, runs

_PLOTS = (
    *("loss-by-step", "loss-by-second", "accuracy-by-step", "accuracy-by-second"),
    *(
        "diversity",
        "inertia",
        "way",
        "spread",
        "time",
        "share",
        "waits",
        "bytes",
        "workers",
    ),
)
_COLOURS = {"light": "#1769d2", "dark": "#69aefc"}  # Of the first run.
# Tells where the plots are, as the page's title.
_PLACES = """
<script>
document.title = JSON.stringify(Object.fromEntries(
  [...document.querySelectorAll("svg[data-plot]")].map(svg => {
    const {x, y, width, height} = svg.getBoundingClientRect();
    return [svg.dataset.plot, [x, y, width, height]];
  }).concat([["width", document.documentElement.scrollWidth]])
));
</script>
"""


def _record(sync, particles=3, **more):
    random = np.random.default_rng(sync)
    return {
        "sync": sync,
        "step": 10 * (sync + 1),
        "epoch": 0,
        "seconds": 5.0 + sync,
        "members": [0, 1, 2],
        "fitness": (2.0 / (1 + sync) + 0.1 * random.random(particles)).tolist(),
        "distances": (1.0 + random.random(particles)).tolist(),
        "diverged": [],
        "measures": {"inertia": 0.2, "cohesion": 2.0, "way": 1.4, "spread": 1.0},
        "bytes": 2000000,
        "waited": [0.05, 0.04, 0.06],
        "waiting_seconds": 0.05,
        "working_seconds": 0.05,
        "metrics": {"loss": 0.5, "accuracy": 0.1 + 0.8 * (1 - 1 / (1 + sync))},
        **more,
    }


def _result(**more):
    return {
        "test_accuracy": 0.9125,
        "test_loss": 0.25,
        "particle_test_accuracies": [0.8, 0.85, 0.9],
        "particle_test_losses": [0.5, 0.4, 0.3],
        "num_particles": 3,
        "train_seconds": 16.0,
        **more,
    }


class _TestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def _write(self, name, records, settings=None, result=None):
        folder = self.folder / name
        folder.mkdir(parents=True)
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / "swarm.jsonl").write_text("".join(lines))
        settings = {"rule": name, "sync_every": 10} if settings is None else settings
        (folder / "flags.json").write_text(json.dumps(settings))
        (folder / "result.json").write_text(json.dumps(result or {}))
        return folder


class PageTest(_TestCase):
    def _page(self, *folders):
        return report.report(folders).read_text()

    def test_two_runs(self):
        pso = self._write("pso", map(_record, range(10)), result=_result())
        average = self._write("average", map(_record, range(7)))
        page = self._page(pso, average)
        for key in (*_PLOTS, "fitness-0", "fitness-1", "distances-0", "distances-1"):
            self.assertEqual(page.count(f'data-plot="{key}"'), 1, key)
        text = re.sub("<[^>]*>|\\s+", " ", page)
        text = re.sub(" +", " ", text)
        for row in (
            "Test accuracy 91.25% –",
            "of the best particle 90.00% –",
            "Local steps 100 70",
            "Training time 16.0 s 11.0 s",
            "Moved to each particle 20.0 MB 14.0 MB",
            "rule pso average",
            "particle 0 0.5000 80.00%",
            "swarm 0.2500 91.25%",
            "average not ended, or cut short",
        ):
            self.assertIn(row, text)
        self.assertNotIn("What stands out", text)
        self.assertNotIn("pso not ended", text)

    def test_needs_nothing_else(self):
        page = self._page(self._write("a", map(_record, range(3)), result=_result()))
        self.assertNotRegex(page, r"<script|<link|<iframe|@import|url\((?!#)")
        self.assertNotRegex(page, r'(?:src|href)="(?!#)')
        names = re.findall(r'\bid="([^"]*)"', page)
        self.assertLen(set(names), len(names))
        used = re.findall(r'(?:href="|url\()#([^")]*)', page)
        self.assertContainsSubset(set(used), names)
        self.assertEmpty(re.findall(r"#0[0-9a-f]0[0-9a-f]{3}\b", page))

    def test_same_page_again(self):
        folder = self._write("a", map(_record, range(3)))
        self.assertEqual(self._page(folder), self._page(folder))

    def test_names_are_text(self):
        name = "a<b>&$x$"
        page = self._page(self._write(name, map(_record, range(3))))
        self.assertNotIn("a<b>", page)
        self.assertGreater(page.count("a&lt;b&gt;&amp;$x$"), 3)

    def test_names_as_short_as_they_can_be(self):
        folders = [self._write(name, [_record(0)]) for name in ("x/seed_0", "y/seed_0")]
        self.assertEqual([r.name for r in runs.read(folders)], ["x/seed_0", "y/seed_0"])
        self.assertEqual([r.name for r in runs.read(folders[:1] * 2)], ["seed_0"])

    def test_half_a_line(self):
        folder = self._write("a", map(_record, range(3)))
        with (folder / "swarm.jsonl").open("a") as file:
            file.write(json.dumps(_record(3))[:50])
        [run] = runs.read([folder])
        self.assertEqual([r["sync"] for r in run.records], [0, 1, 2])
        lines = files.JsonLines(folder / "swarm.jsonl", "sync")
        for sync in (2, 3):
            lines.append(_record(sync, seconds=0.5 * sync))
        lines.close()
        [run] = runs.read([folder])
        self.assertEqual([r["sync"] for r in run.records], [0, 1, 2, 3])
        # Resumed after a loss: the time goes on from what was before.
        self.assertEqual(run.seconds.tolist(), [5.0, 6.0, 7.0, 7.5])

    def test_one_synchronisation(self):
        page = self._page(self._write("a", [_record(0)]))
        self.assertIn('data-plot="loss-by-step"', page)

    def test_who_left_and_joined(self):
        there = [0, 1, 2], [0, 2], [0, 2], [0, 1, 2]
        records = [_record(i, members=m) for i, m in enumerate(there)]
        for record in records[1:3]:
            record["fitness"][1] = record["distances"][1] = None
        page = self._page(self._write("a", records))
        self.assertIn("worker 1 left before step 20", page)
        self.assertIn("worker 1 joined before step 40", page)
        self.assertNotIn("All workers stayed", page)

    def test_other_numbers_of_particles(self):
        records = [*map(_record, range(3)), _record(3, 5), _record(4, 1)]
        [run] = runs.read([self._write("a", records)])
        self.assertEqual(run.table("fitness").shape, (5, 5))
        self.assertIn("5 particles", report.render([run]))

    def test_out_of_order(self):
        records = [*map(_record, range(3))]
        records[1] |= {"diverged": [0], "fitness": [None, 1.0, 1.0]}
        records[1]["distances"] = [None, 1.0, 1.0]
        page = self._page(self._write("a", records))
        self.assertIn("Crosses: a particle was out of order", page)

    def test_what_is_not_recorded(self):
        records = [
            _record(i, measures={}, metrics={"loss": None}, fitness=[None] * 3)
            for i in range(3)
        ]
        page = self._page(self._write("a", records, settings={}))
        for key in ("diversity", "accuracy-by-step", "loss-by-step", "fitness-0"):
            self.assertNotIn(f'data-plot="{key}"', page)
        self.assertIn("these runs do not record it", page)
        self.assertIn('data-plot="bytes"', page)

    def test_warnings(self):
        same = {"fitness": [1.0] * 3, "distances": [1.0] * 3}
        page = self._page(self._write("a", [_record(0), _record(1, **same)]))
        self.assertRegex(page, "What stands out(.|\n)*swarm has collapsed")

    def test_many_runs_and_records(self):
        folders = [
            self._write(f"run_{i}", map(_record, range(700 if not i else 3)))
            for i in range(9)
        ]
        page = self._page(*folders)
        self.assertIn('data-plot="fitness-8"', page)
        self.assertLess(len(page), 2e6)

    def test_time_adds_up(self):
        [run] = runs.read([self._write("a", map(_record, range(10)), result=_result())])
        spent = report_plots.spent(run)
        self.assertAlmostEqual(sum(spent.values()), 16.0)
        self.assertAlmostEqual(spent["start"], 4.9)
        self.assertAlmostEqual(spent["waiting"], 0.5)


class ErrorsTest(_TestCase):
    def _run(self, *folders):
        output = subprocess.run(
            [sys.executable, "-m", "trainers.report", *map(str, folders)],
            capture_output=True,
            text=True,
            timeout=100,
        )
        return output.returncode, output.stderr

    def test_command(self):
        folder = self._write("a", map(_record, range(3)))
        code, text = self._run(folder)
        self.assertEqual(code, 0, text)
        self.assertTrue((folder / "report.html").exists())
        code, text = self._run(self.folder / "nowhere")
        self.assertEqual(code, 1)
        self.assertStartsWith(text, "There is no folder")
        self.assertIn("--output_dir of a run of trainers.train", text)

    def test_output(self):
        folder = self._write("a", [_record(0)])
        path = self.folder / "page.html"
        with flagsaver.flagsaver():
            rest = flags.FLAGS(["report", f"--output={path}", str(folder)])
            self.assertEqual(report.main(rest), 0)
        self.assertIn("Swarm report", path.read_text())
        with self.assertRaisesRegex(OSError, "Cannot write .*nowhere"):
            report.report([folder], self.folder / "nowhere" / "page.html")

    def test_no_folder(self):
        with self.assertRaisesRegex(ValueError, "nothing to show.*one or more"):
            report.report([])

    @parameterized.parameters(
        ({}, "no swarm.jsonl. Expected the --output_dir"),
        ({"results.json": "[]"}, "one of trainers.compare, .*results.md"),
        ({"inside/swarm.jsonl": ""}, "some inside of it: inside"),
        ({"swarm.jsonl": ""}, "has no record yet"),
        ({"swarm.jsonl": '{"sync"'}, "has no record yet"),
        ({"swarm.jsonl": '{"sync"\n{"sync": 1}\n'}, "Line 1 of .* is not JSON"),
        ({"swarm.jsonl": '{"sync": 1}\n'}, "Line 1 of .* is no record"),
        ({"swarm.jsonl": "[1]\n"}, "Line 1 of .* is no record"),
        (
            {"swarm.jsonl": json.dumps(_record(0)), "flags.json": "{"},
            "flags.json' is not JSON",
        ),
    )
    def test_no_run(self, written, error):
        folder = self.folder / "a"
        folder.mkdir()
        for name, text in written.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        with self.assertRaisesRegex(ValueError, error):
            report.report([folder])

    def test_usage(self):
        with (
            flagsaver.flagsaver(),
            self.assertRaises(flags.UnrecognizedFlagError),
        ):
            flags.FLAGS(["report", "--outptu=x"])


_BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)


class BrowserTest(_TestCase):
    """Looks at the page in headless Chromium."""

    def _browse(self, page, *arguments):
        command = [_BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu"]
        command += ["--hide-scrollbars", f"--user-data-dir={self.folder / 'profile'}"]
        return subprocess.run(
            [*command, *arguments, page.as_uri()],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "HOME": str(self.folder)},
        ).stdout

    @parameterized.parameters(("light", 1280), ("dark", 500))
    def test_every_plot_is_seen(self, scheme, width):
        if _BROWSER is None:
            self.skipTest("There is no Chromium on the PATH.")
        folders = [
            self._write(name, map(_record, range(10)), result=_result())
            for name in ("pso", "average")
        ]
        page = report.report(folders)
        page.write_text(page.read_text() + _PLACES)
        window = [f"--window-size={width},9000"]
        window += [f"--blink-settings=preferredColorScheme={scheme == 'light':d}"]
        dom = self._browse(page, "--dump-dom", *window)
        places = json.loads(re.search("<title>(.*)</title>", dom)[1])
        self.assertLessEqual(places.pop("width"), width)
        expected = [f"{what}-{i}" for what in ("fitness", "distances") for i in (0, 1)]
        self.assertCountEqual(places, [*_PLOTS, *expected])
        self._browse(page, f"--screenshot={self.folder / 'page.png'}", *window)
        picture = np.array(Image.open(self.folder / "page.png").convert("RGB"))
        background = picture[-1, -1].astype(int)
        self.assertEqual(background.sum() > 3 * 128, scheme == "light")
        for key, (x, y, plot_width, plot_height) in places.items():
            self.assertGreater(plot_width, 300, key)
            x, y, right, low = np.int64([x, y, x + plot_width, y + plot_height])
            plot = picture[y:low, x:right].reshape(-1, 3).astype(int)
            # Curves, bars or bands: many pixels of colour. Lines of the grid are grey.
            colourful = np.ptp(plot, axis=1) > 60
            self.assertGreater(colourful.sum(), 200, key)


if __name__ == "__main__":
    absltest.main()
