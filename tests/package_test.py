"""Tests of what `import tf_psops` gives, and of what it costs."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

from absl.testing import absltest, parameterized

import tf_psops


def _run(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=200
    )


class ImportTest(parameterized.TestCase):
    @parameterized.parameters(
        "import tf_psops",
        "import tf_psops.launch",
        "import tf_psops.cluster, tf_psops.heartbeat",
        "from tf_psops import launch, cluster, heartbeat",
        "import tf_psops; tf_psops.__version__, tf_psops.cluster, dir(tf_psops)",
        "import tf_psops; hasattr(tf_psops, 'no_such_name')",
        # As `python -m` does it, up to the error of a missing command.
        "import runpy\n"
        "try: runpy.run_module('tf_psops.launch', run_name='__main__')\n"
        "except SystemExit: pass",
    )
    def test_without_tensorflow(self, program):
        program += (
            "\nimport sys; print({'tensorflow', 'keras', 'numpy'} & {*sys.modules})"
        )
        result = _run(program)
        self.assertEqual(result.stdout.splitlines()[-1:], ["set()"], result)

    @parameterized.parameters(
        "import tf_psops; tf_psops.PSOSync, tf_psops.SwarmStrategy, tf_psops.rules",
        "from tf_psops import PSOSync, SwarmStrategy, ParticleSwarm, rules",
        "from tf_psops import *; PSOSync, SwarmStrategy, Rule",
    )
    def test_with_tensorflow(self, program):
        program += "\nimport sys; assert 'tensorflow' in sys.modules"
        result = _run(program)
        self.assertEqual(result.returncode, 0, result)


class PrivateNamesTest(absltest.TestCase):
    def test_one_module_imports_them(self):
        folder = pathlib.Path(tf_psops.__file__).parent
        modules = [
            module.relative_to(folder).as_posix()
            for module in folder.rglob("*.py")
            if re.search(r"\b(tensorflow\.python|keras\.src)\b", module.read_text())
        ]
        self.assertEqual(modules, ["tensorflow_internals.py"])


class NamesTest(absltest.TestCase):
    def test_type_checkers_see_the_same_names(self):
        tree = ast.parse(inspect.getsource(tf_psops))
        block, _ = [node for node in tree.body if isinstance(node, ast.If)]
        seen = {alias.name: node.module for node in block.body for alias in node.names}
        homes = {name: f"tf_psops.{home}" for name, home in tf_psops._HOMES.items()}
        self.assertEqual(seen, homes | dict.fromkeys(tf_psops._MODULES, "tf_psops"))

    def test_all_are_there(self):
        for name in tf_psops.__all__:
            self.assertIsNotNone(getattr(tf_psops, name))
            self.assertIn(name, dir(tf_psops))

    def test_unknown_name(self):
        with self.assertRaisesRegex(AttributeError, "'tf_psops' .* 'no_such_name'"):
            _ = tf_psops.no_such_name


if __name__ == "__main__":
    absltest.main()
