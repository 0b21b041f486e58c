"""Checks that the BUILD files tell what the sources import.

Every module has one target: a `py_test` if it is a test, a `py_binary` if it can be
run, else a `py_library`; the `__init__.py` of a package stands under the package's
name. Its `deps` are its imports of this project, those inside functions too. After a
change of imports, or for a new module:

```bash
python tests/build_test.py --write
```

What else stands in a target, such as the `size` of a test, is kept as it is; a comment
only above the first target.
"""

import ast
import graphlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

from absl.testing import absltest

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_FOLDERS = (
    "tf_psops",
    "tf_psops/rules",
    "tf_psops/sync",
    "tf_psops/transport",
    "tf_psops/keras_hooks",
    "tf_psops/backups",
    "tf_psops/batches",
    "tf_psops/launcher",
    "trainers",
    "trainers/datasets",
    "tests",
    "tests/engines",
    "examples",
    "examples/kubernetes",
    "examples/ray",
    "examples/several_machines",
    "examples/slurm",
    "benchmarks",
)
_RULES = ("py_binary", "py_library", "py_test")
_SIZES = ("small", "medium", "large", "enormous")
_HEADER = 'package(default_visibility = ["//visibility:public"])\n'
_BAZEL_SECONDS = 120


def _folders():
    return [_ROOT / name for name in _FOLDERS if (_ROOT / name).is_dir()]


def _modules(folder):
    """Returns the modules of a folder that get a target."""
    return [path for path in sorted(folder.glob("*.py")) if path.name != "conftest.py"]


def _target(path):
    """Returns the package and the name of a module's target."""
    name = path.parent.name if path.stem == "__init__" else path.stem
    return path.parent.relative_to(_ROOT).as_posix(), name


def _label(path, package):
    """Returns a module's label, in the short form for its own package."""
    of, name = _target(path)
    if of == package:
        return f":{name}"
    return f"//{of}" if of.split("/")[-1] == name else f"//{of}:{name}"


def _find(dotted):
    """Returns the source of a module of this project, or `None`."""
    path = _ROOT.joinpath(*dotted.split("."))
    for source in (path.with_suffix(".py"), path / "__init__.py"):
        if source.parent in _folders() and source.is_file():
            return source
    return None


def _imports(path):
    """Returns the sources of this project that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(_find(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(
                    f"{path}:{node.lineno} has a relative import. Expected the full "
                    "name of the module."
                )
            for alias in node.names:
                submodule = _find(f"{node.module}.{alias.name}")
                found.add(submodule or _find(node.module))
    return found - {None, path}


def _rule(path):
    """Returns the kind of a module's target."""
    if path.stem.endswith("_test"):
        return "py_test"
    if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8"):
        return "py_binary"
    return "py_library"


def _read(text):
    """Returns what stands before the first target, and each target's attributes."""
    calls = [
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    calls = [call for call in calls if ast.unparse(call.func) in _RULES]
    lines = text.splitlines(keepends=True)
    header = "".join(lines[: calls[0].lineno - 1] if calls else lines)
    targets = [
        {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        for call in calls
    ]
    return header, {target["name"]: target for target in targets}


def _expected(folder, text):
    """Returns what the BUILD file of a folder has to say, given what it says."""
    header, old = _read(text or _HEADER)
    parts = [header.rstrip() + "\n"]
    for path in _modules(folder):
        package, name = _target(path)
        deps = {_label(source, package) for source in _imports(path)}
        size = {"size": "medium"} if _rule(path) == "py_test" else {}
        attributes = {
            "name": name,
            **size,
            **old.get(name, {}),
            "srcs": [path.name],
            "deps": sorted(deps, key=lambda label: (label[0] != ":", label)),
        }
        parts.append(_format(_rule(path), attributes))
    return "\n".join(parts)


def _format(rule, attributes):
    lines = [f"{rule}("]
    for name, value in attributes.items():
        if isinstance(value, list) and len(value) > 1:
            lines.append(f"    {name} = [")
            lines += [f"        {json.dumps(item)}," for item in value]
            lines.append("    ],")
        elif value != []:
            lines.append(f"    {name} = {json.dumps(value)},")
    return "\n".join([*lines, ")\n"])


def _write():
    for folder in _folders():
        build = folder / "BUILD"
        text = build.read_text(encoding="utf-8") if build.exists() else ""
        build.write_text(_expected(folder, text), encoding="utf-8")


class BuildTest(absltest.TestCase):
    maxDiff = None

    def test_build_files_match_imports(self):
        for folder in _folders():
            build = folder / "BUILD"
            with self.subTest(build=build.relative_to(_ROOT).as_posix()):
                text = build.read_text(encoding="utf-8") if build.exists() else ""
                self.assertEqual(
                    text,
                    _expected(folder, text),
                    "Expected the lines marked with +. Write them with `python "
                    "tests/build_test.py --write`.",
                )

    def test_tests_have_a_size(self):
        for folder in _folders():
            _, targets = _read((folder / "BUILD").read_text(encoding="utf-8"))
            for name, target in targets.items():
                if name.endswith("_test"):
                    self.assertIn(target.get("size"), _SIZES, name)

    def test_imports_have_no_cycle(self):
        imports = {
            path: _imports(path) for folder in _folders() for path in _modules(folder)
        }
        graphlib.TopologicalSorter(imports).prepare()

    def test_bazel_reads_build_files(self):
        if not shutil.which("bazel"):
            self.skipTest("There is no bazel on the PATH.")
        version = re.search(r"bazel (\d+)", _run("bazel", "--version").stdout)
        if version and int(version[1]) > 6:
            self.skipTest("The BUILD files are for Bazel 4 to 6, with Python rules.")
        with tempfile.TemporaryDirectory() as root:
            query = _run(
                "bazel", "--batch", f"--output_user_root={root}", "query", "//..."
            )
        self.assertEqual(query.returncode, 0, query.stderr)
        for folder in _folders():
            for path in _modules(folder):
                package, name = _target(path)
                self.assertIn(f"//{package}:{name}", query.stdout.splitlines())


def _run(*command):
    return subprocess.run(
        command,
        cwd=_ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_BAZEL_SECONDS,
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        _write()
    else:
        absltest.main()
