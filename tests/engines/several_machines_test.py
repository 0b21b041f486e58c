"""Tests of `examples/several_machines`: two hosts, a firewall, a secret and TLS."""

import pathlib
import shutil
import sys
import tempfile

import keras
import machines
import pytest
from absl.testing import absltest

_EXAMPLES = machines.ROOT / "examples" / "several_machines"
_SECONDS = 500
# Both workers run on this machine, at addresses of their own.
_SCRIPT = """
set -e
nft -f {examples}/firewall.nft
cd {folder}
bash {examples}/certificates.sh certificates node1 node2
openssl rand -hex 32 > secret
run() {{
    export TF_CONFIG='{{"cluster": {{"worker": ["node1:2222", "node2:2222"]}},
        "task": {{"type": "worker", "index": '$1'}}}}'
    export TF_PSOPS_SECRET_FILE=secret
    export TF_PSOPS_TLS_CERTIFICATE=certificates/$2.pem
    export TF_PSOPS_TLS_KEY=certificates/$2.key
    export TF_PSOPS_TLS_AUTHORITY=certificates/ca.pem
    exec {python} {examples}/train_digits.py --model=digits.keras
}}
(run 0 node1) & first=$!
(run 1 node2) & second=$!
until [[ $(ss --no-header -ltn | wc -l) == 2 ]]; do sleep 0.2; done
sleep 1
ss --no-header -ltn | awk '{{print "listens", $4}}'
wait $first
wait $second
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
class SeveralMachinesTest(absltest.TestCase):
    def test_secret_tls_and_a_firewall_with_one_port(self):
        missing = [n for n in ("bash", "nft", "openssl", "ss") if not shutil.which(n)]
        if missing:
            self.skipTest(f"There is no {missing[0]} on the PATH.")
        if reason := machines.why_not():
            self.skipTest(reason)
        folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))
        script = _SCRIPT.format(
            folder=folder, examples=_EXAMPLES, python=sys.executable
        )
        with machines.network(folder, ["bash", "-c", script]) as process:
            code = process.wait(_SECONDS)
        output = (folder / "output").read_text()
        self.assertEqual(code, 0, output)
        self.assertEqual(
            sorted(line for line in output.splitlines() if "listens" in line),
            ["listens 198.51.100.1:2222", "listens 198.51.100.2:2222"],
        )
        for index in 0, 1:
            self.assertIn(f"Worker {index} of 2: 15 synchronisations", output)
        self.assertLen(keras.models.load_model(folder / "digits.keras").weights, 4)


if __name__ == "__main__":
    absltest.main()
