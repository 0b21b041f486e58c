"""Runs the shell commands of the documentation, or only checks their flags."""

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
import pathlib
import re
import runpy
import socket
import subprocess
import sys
import tempfile
from unittest import mock

from absl import app, flags  # noqa: F401  `app` has a flag of its own.

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Bash does all but start a program: that is written down.
_RECORDER = """
PATH=/nowhere
command_not_found_handle() { printf '%s\\x1f' "$@" >> "$RECORD"; echo >> "$RECORD"; }
cd() { :; }
source() { :; }
unshare() { while [[ "$1" == --* ]]; do shift; done; "$@"; }
sh() { eval "$2"; }
"""
_OURS = ("benchmarks", "tests", "tf_psops", "trainers")
_PARSE_SECONDS = 60
_ADDRESS = re.compile(r"127\.0\.0\.1:(\d+)")


def record(text):
    """Returns the arguments of all programs that shell commands would start."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "record"
        file.touch()
        subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", _RECORDER + text],
            env={"RECORD": str(file)},
            check=True,
            timeout=_PARSE_SECONDS,
        )
        lines = file.read_text(encoding="utf-8").split("\x1f\n")
    return [line.split("\x1f") for line in lines if line]


def check(command):
    """Raises an error if a program of this project would refuse its arguments.

    Args:
        command: The arguments, the program first. Of others than Python and pip only a
            Python command behind them is looked at.
    """
    if command[0] == "pip" or command[:3] == ["python", "-m", "pip"]:
        _check_extras(command)
    elif command[:2] == ["python", "-m"]:
        _check_module(command[2], command[3:])
    elif "python" in command[1:]:
        check(command[command.index("python", 1) :])
    elif command[0] == "python" and command[1].startswith("examples/"):
        _parse_apart(_run_path, str(ROOT / command[1]), command[2:])


def _check_extras(command):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = project.partition("[project.optional-dependencies]")[2]
    known = re.findall(r"^(\w+) = \[", extras.partition("\n[")[0], re.MULTILINE)
    for names in re.findall(r"\.\[(.*?)\]", " ".join(command)):
        unknown = {name.strip() for name in names.split(",")} - {*known}
        if unknown:
            raise ValueError(f"No extras {unknown}. Received: {command}.")


def _check_module(module, arguments):
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"There is no module {module}.")
    if module.partition(".")[0] not in _OURS:
        return
    if module == "tf_psops.launch":
        arguments, command = _split(arguments)
        if command:
            check(command)
        arguments = [*arguments, "--", "true"]
    _parse_apart(_run_module, module, arguments)


def _parse_apart(run, name, arguments):
    context = multiprocessing.get_context("forkserver")
    # Slow to import, and the same for all.
    context.set_forkserver_preload(["tf_psops.pso_sync", "trainers.training"])
    with (
        tempfile.NamedTemporaryFile("r") as log,
        mock.patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}),
    ):
        process = context.Process(target=_parse, args=(run, name, arguments, log.name))
        process.start()
        process.join(_PARSE_SECONDS)
        if process.exitcode is None:
            process.kill()
        if process.exitcode:
            raise ValueError(f"{name} refuses {arguments}:\n{log.read()}")


def _split(arguments):
    place = [*arguments, "--"].index("--")
    return arguments[:place], arguments[place + 1 :]


def _parse(run, name, arguments, log):
    """Is what a process of its own does: a program's flags are read, and no more."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    sys.argv = [name, *arguments]
    flags.FLAGS.set_default("only_check_args", True)
    read = argparse.ArgumentParser.parse_args

    def only_read(*args):
        read(*args)
        os._exit(0)

    try:
        with mock.patch.object(argparse.ArgumentParser, "parse_args", only_read):
            run(name)
    except ModuleNotFoundError as error:
        # Of an engine, which is not there: its own test runs the command.
        if error.name.partition(".")[0] in _OURS:
            raise


def _run_module(name):
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _run_path(name):
    runpy.run_path(name, run_name="__main__")


def run(texts, folder, timeout):
    """Runs shell commands, several at the same time, and returns their output.

    Args:
        texts: A list of the commands of each shell. Loopback addresses in them get
            free ports, the same in all.
        folder: Where to run them.
        timeout: Seconds for all of them.

    Raises:
        AssertionError: If one fails.
    """
    ports = _free_ports(set(_ADDRESS.findall("".join(texts))))
    environ = {
        **os.environ,
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "2",
    }
    with contextlib.ExitStack() as stack:
        shells = []
        for text in texts:
            text = _ADDRESS.sub(lambda match: f"127.0.0.1:{ports[match[1]]}", text)
            shell = subprocess.Popen(
                ["/bin/bash", "-euo", "pipefail", "-c", text],
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(shell.kill)
            shells.append(shell)
        outputs = [shell.communicate(timeout=timeout)[0] for shell in shells]
    for text, shell, output in zip(texts, shells, outputs):
        if shell.returncode:
            raise AssertionError(f"{text}\nexited with {shell.returncode}:\n{output}")
    return outputs


def _free_ports(names):
    with contextlib.ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in names}
        for free in sockets.values():
            free.bind(("127.0.0.1", 0))
        return {name: free.getsockname()[1] for name, free in sockets.items()}
