"""Runs every code block of README, of the pages in docs and of public docstrings.

`code_blocks` tells how a page says that a block is run otherwise. All Python blocks of
a page are one program, which begins where README's ten lines end. Of shell blocks the
default tests check the flags, and the slow ones run them.

```bash
python tests/docs_test.py --count
```

tells how many there are of each kind.
"""

import collections
import contextlib
import functools
import inspect
import io
import itertools
import os
import pathlib
import re
import sys
import tempfile

import code_blocks
import pytest
import shell_commands
import yaml
from absl.testing import absltest, parameterized

import tf_psops
from tf_psops import cluster, heartbeat, launch

_PAGES = code_blocks.pages()
_README = code_blocks.ROOT / "README.md"
_FEW = 0.1
_SECONDS = 280

_DOCUMENTED = {
    **{name: getattr(tf_psops, name) for name in tf_psops._HOMES},
    "in_process": tf_psops.SwarmStrategy.in_process,
    "read_tf_config": cluster.read_tf_config,
    "beat": heartbeat.beat,
    "launch": launch.launch,
}
# What the examples in docstrings take for granted.
_AROUND_EXAMPLES = """
import json
import pathlib
import sys

import keras
import tensorflow as tf

import tf_psops
from tf_psops import heartbeat
from tf_psops.cluster import read_tf_config
from tf_psops.launch import launch

def make_model():
    return keras.Sequential([keras.layers.Dense(1)])

rows = tf.random.normal([160, 4])
dataset = tf.data.Dataset.from_tensor_slices((rows, rows[:, :1])).batch(8)
with tf_psops.SwarmStrategy.in_process(2).scope():
    model = make_model()
    model.compile(keras.optimizers.SGD(0.05), "mse")
batches, train_step = [rows], print
pathlib.Path("train.py").touch()
"""


def _name(page):
    return page.relative_to(code_blocks.ROOT).as_posix()


def _blocks(page, language, *notes):
    blocks = code_blocks.read(page)
    return [b for b in blocks if b.language == language and b.note in notes]


def _having(language, *notes):
    """Returns the pages with such blocks, by their names."""
    return [(_name(p), p) for p in _PAGES if _blocks(p, language, *notes)]


def _execute(block, namespace):
    # With the lines above it, so that a traceback names the right one.
    text = "\n" * block.line + block.text
    exec(compile(text, _name(block.page), "exec"), namespace)


@functools.cache
def _after_ten_lines():
    """Returns the names that README's program leaves."""
    namespace = {"__name__": "__main__"}
    for block in _blocks(_README, "python", ""):
        _execute(block, namespace)
    return namespace


def _run_all(page, folder, notes):
    """Runs the shell blocks of a page in their order, and writes its programs."""
    kinds = {"bash": notes, "python": ("file",)}
    blocks = code_blocks.read(page)
    if '--8<-- "README.md:install"' in page.read_text(encoding="utf-8"):
        blocks = _blocks(_README, "bash", "installed") + blocks
    blocks = [b for b in blocks if b.note in kinds.get(b.language, ())]
    for note, group in itertools.groupby(blocks, lambda block: block.note):
        group = list(group)
        if note == "file":
            for block in group:
                pathlib.Path(folder, block.detail).write_text(block.text)
        elif note == "worker":
            shell_commands.run([b.text for b in group], folder, _SECONDS)
        else:
            for text in (block.text for block in group):
                if note == "installed":
                    text = text.partition("&&")[2]
                shell_commands.run([text], folder, _SECONDS)


class _InFolderTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.enter_context(tempfile.TemporaryDirectory()))


class PythonTest(_InFolderTestCase):
    @parameterized.named_parameters(*_having("python", ""))
    def test_blocks_run(self, page):
        with contextlib.redirect_stdout(io.StringIO()):
            namespace = {**_after_ten_lines()}
            for block in _blocks(page, "python", "") if page != _README else ():
                _execute(block, namespace)

    @parameterized.named_parameters(*_having("python", "file", "skip"))
    def test_programs_compile(self, page):
        for block in _blocks(page, "python", "file", "skip"):
            compile(block.text, _name(page), "exec")

    def test_examples_in_docstrings(self):
        around = {}
        exec(_AROUND_EXAMPLES, around)
        with contextlib.redirect_stdout(io.StringIO()):
            for name, public in _DOCUMENTED.items():
                text = inspect.getdoc(public)
                examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
                if name not in ("News", "Offer"):
                    self.assertNotEmpty(examples, name)
                for example in examples:
                    with self.subTest(name):
                        exec(example, {**around})


class ShellTest(_InFolderTestCase):
    @parameterized.named_parameters(
        *_having("bash", "", "flags", "skip", "installed", "quick", "worker")
    )
    def test_flags(self, page):
        texts = [b.text for b in code_blocks.read(page) if b.language == "bash"]
        for text in texts + code_blocks.commands_in_text(page):
            for command in shell_commands.record(text):
                shell_commands.check(command)

    def test_flags_in_docstrings(self):
        texts = re.findall(r"```bash\n(.*?)```", launch.__doc__, re.DOTALL)
        self.assertNotEmpty(texts)
        for command in itertools.chain(*map(shell_commands.record, texts)):
            shell_commands.check(command)

    @parameterized.named_parameters(*_having("bash", "quick"))
    def test_quick_blocks_run(self, page):
        _run_all(page, os.getcwd(), ("quick",))

    @parameterized.named_parameters(
        *_having("bash", "", "installed", "quick", "worker")
    )
    @pytest.mark.slow
    @pytest.mark.timeout(1200)
    def test_blocks_run(self, page):
        _run_all(page, os.getcwd(), ("", "installed", "quick", "worker"))

    def test_wrong_flag_is_found(self):
        for command in (
            "python -m trainers.train --dataset=digit",
            "python -m trainers.train --epoch=3",
            "python -m tf_psops.launch --num_workers=0 -- true",
            "python -m tf_psops.launch -- python -m trainers.train --rule=pos",
            "python -m benchmarks.no_such",
            "python -m tests.compatibility --version=3",
            "srun python examples/slurm/train_digits.py --epochs=3",
            "pip install .[no_such]",
        ):
            with self.subTest(command), self.assertRaises(ValueError):
                [arguments] = shell_commands.record(command)
                shell_commands.check(arguments)


class PagesTest(parameterized.TestCase):
    def test_every_block_is_of_a_kind(self):
        for page in _PAGES:
            for block in code_blocks.read(page):
                self.assertIn(
                    (block.language, block.note),
                    {
                        *itertools.product(("", "text", "yaml"), [""]),
                        *itertools.product(("python",), ("", "file", "skip")),
                        *itertools.product(
                            ("bash",),
                            ("", "flags", "skip", "installed", "quick", "worker"),
                        ),
                    },
                    f"{block.place}: see tests/code_blocks.py.",
                )

    def test_yaml(self):
        for page in _PAGES:
            for block in _blocks(page, "yaml", ""):
                self.assertNotEmpty(list(yaml.safe_load_all(block.text)), block.place)

    def test_what_is_skipped_has_a_reason_and_is_little(self):
        blocks = [block for page in _PAGES for block in code_blocks.read(page)]
        for block in blocks:
            if block.note in ("skip", "flags", "installed", "file", "worker"):
                self.assertNotEmpty(block.detail, block.place)
        skipped = [block for block in blocks if block.note == "skip"]
        elsewhere = [re.findall(r"tests/\S+\.py", b.detail) for b in skipped]
        for block, files in zip(skipped, elsewhere):
            for file in files:
                self.assertTrue((code_blocks.ROOT / file).exists(), block.place)
        self.assertLess(elsewhere.count([]), _FEW * len(blocks))

    @parameterized.parameters("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
    def test_links_of_pages_outside_of_the_site(self, name):
        page = code_blocks.ROOT / name
        for path, anchor in code_blocks.links(page):
            target = page.parent / path if path else page
            self.assertTrue(target.exists(), f"{name} has a link to {path}.")
            if anchor:
                self.assertIn(anchor, code_blocks.anchors(target))

    def test_readme_is_short(self):
        self.assertLess(len(_README.read_text(encoding="utf-8").splitlines()), 85)


def _count():
    blocks = [block for page in _PAGES for block in code_blocks.read(page)]
    counts = collections.Counter((b.language, b.note or "run") for b in blocks)
    for (language, note), number in sorted(counts.items()):
        print(f"{number:3} {language or 'formula'}: {note}")
    for block in blocks:
        if block.note in ("skip", "flags"):
            print(f"{block.place}: {block.note}, {block.detail}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--count"]:
        _count()
    else:
        absltest.main()
