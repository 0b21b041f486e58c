"""Tests of `examples/slurm` under a real Slurm of two nodes on this machine."""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile

import keras
import machines
import pytest
import slurm_cluster
from absl.testing import absltest, parameterized

_EXAMPLES = machines.ROOT / "examples" / "slurm"
_TRAIN = f"python {_EXAMPLES}/train_digits.py"
_SECONDS = 500
# A job gets SIGTERM once it has a backup, comes back, and must end before long.
_PREEMPT = """
set -e; mkdir {folder}
job=$(sbatch --parsable --output={folder}/job.log {examples}/train.sbatch {folder} \\
    --epochs=20)
wait_for() {{
    for _ in $(seq 300); do if "$@"; then return; fi; sleep 0.3; done
    echo "$@ is not true"; cat {folder}/job.log; exit 1
}}
has_backup() {{ compgen -G "{folder}/backups/fit-0/sync-*" > /dev/null; }}
is_over() {{ [[ $(squeue --noheader --job="$job" --format=%T) != [PRC]* ]]; }}
wait_for has_backup
scancel --signal=TERM "$job"
wait_for is_over
scontrol show job "$job" | grep -E -o 'JobState=[A-Z]+|Restarts=[0-9]+'
cat {folder}/job.log
"""


def _with_tf_config():
    spec = importlib.util.spec_from_file_location(
        "with_tf_config", _EXAMPLES / "with_tf_config.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TfConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        ("1(x2)", ["a", "b"], ["a:8888", "b:8888"]),
        ("2", ["a"], ["a:8888", "a:8889"]),
        (
            "2(x2),1",
            ["a", "b", "c"],
            ["a:8888", "a:8889", "b:8888", "b:8889", "c:8888"],
        ),
        ("1,2", ["n10", "n2"], ["n10:8888", "n2:8888", "n2:8889"]),
    )
    def test_follows_the_tasks_of_slurm(self, tasks_per_node, hosts, workers):
        environ = {"SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_PROCID": "1"}
        tf_config = json.loads(_with_tf_config().tf_config(environ, hosts))
        self.assertEqual(tf_config["cluster"], {"worker": workers})
        self.assertEqual(tf_config["task"], {"type": "worker", "index": 1})


@pytest.mark.slow
@pytest.mark.timeout(600)
class SlurmTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        missing = [name for name in slurm_cluster.PROGRAMS if not shutil.which(name)]
        if missing:
            self.skipTest(f"There is no {missing[0]}. Install slurm-wlm and munge.")
        if reason := machines.why_not():
            self.skipTest(reason)
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def run_on_slurm(self, script):
        """Runs a script of Bash where Slurm is, and returns its output."""
        path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
        start = [sys.executable, slurm_cluster.__file__, self.folder / "slurm"]
        with machines.network(
            self.folder, [*start, "bash", "-c", script], PATH=path
        ) as process:
            code = process.wait(_SECONDS)
        output = (self.folder / "output").read_text()
        self.assertEqual(code, 0, output)
        return output

    def weights(self, path):
        model = keras.models.load_model(path)
        return [w.tolist() for w in model.get_weights()]

    def test_resolver_and_going_on_after_sigterm(self):
        preempted = self.folder / "preempted"
        output = self.run_on_slurm(
            f"srun --nodes=2 --ntasks-per-node=1 {_TRAIN} --epochs=20 "
            f"--backup_dir={self.folder}/uncut --model={self.folder}/uncut.keras\n"
            + _PREEMPT.format(folder=preempted, examples=_EXAMPLES)
        )
        self.assertLen(re.findall("2 workers, 58 synchronisations", output), 2)
        self.assertIn("JobState=COMPLETED", output)
        self.assertIn("Restarts=1", output)
        self.assertIn("Leaving after SIGTERM; a backup is taken.", output)
        uncut = self.weights(self.folder / "uncut.keras")
        self.assertEqual(self.weights(preempted / "model.keras"), uncut)

    def test_tf_config_for_programs_that_know_nothing_of_slurm(self):
        output = self.run_on_slurm(
            "srun --nodes=1 --ntasks-per-node=2 --label "
            f"python {_EXAMPLES}/with_tf_config.py "
            "python -m trainers.train --model=mlp --epochs=2"
        )
        for task in 0, 1:
            self.assertRegex(output, rf"{task}: swarm +0\.")


if __name__ == "__main__":
    absltest.main()
