"""Tests of `examples/kubernetes`: its manifests, and what they start.

No Kubernetes runs. The manifests are checked against the schemas of Kubernetes and of
Kubeflow, and the commands of their pods run as processes with the names of the pods, in
a network of their own.
"""

import importlib
import json
import pathlib
import re
import shlex
import sys
import tempfile

import keras
import machines
import pytest
import yaml
from absl.testing import absltest, parameterized

from tf_psops import cluster

_EXAMPLES = machines.ROOT / "examples" / "kubernetes"
_SECONDS = 500
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def _manifests(name):
    return list(yaml.safe_load_all((_EXAMPLES / name).read_text()))


def _of_kind(kind, name):
    (found,) = [m for m in _manifests(name) if m["kind"] == kind]
    return found


def _environ(container, index):
    """Returns a container's environment, as Kubernetes makes it."""
    environ = {}
    for variable in container.get("env", ()):
        source = variable.get("valueFrom")
        if source is None:
            value = re.sub(r"\$\((\w+)\)", lambda m: environ[m[1]], variable["value"])
        elif "secretKeyRef" in source:
            value = "a secret"
        else:
            assert source["fieldRef"]["fieldPath"] == _INDEX
            value = str(index)
        environ[variable["name"]] = value
    return environ


def _pod(container, index, **environ):
    command = container["command"] + container.get("args", [])
    return command, {**_environ(container, index), **environ}


def _indexed_pods():
    spec = _of_kind("Job", "indexed_job.yaml")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    return [_pod(container, index) for index in range(spec["completions"])]


def _in_image():
    """Returns the paths of the programs that the image has, by their names."""
    paths = re.findall(r"examples/\S+\.py", (_EXAMPLES / "Dockerfile").read_text())
    return {pathlib.Path(path).name: path for path in paths}


def _tf_job_pods(kind, spec):
    """Returns the pods of some replicas, with the operator's TF_CONFIG."""
    # The evaluator has one, but is not in the cluster, its own included.
    jobs = {
        job.lower(): [
            f"digits-{job.lower()}-{index}.default.svc:2222"
            for index in range(replicas["replicas"])
        ]
        for job, replicas in spec.items()
        if job != "Evaluator"
    }
    (container,) = spec[kind]["template"]["spec"]["containers"]
    for index in range(spec[kind]["replicas"]):
        task = {"type": kind.lower(), "index": index}
        tf_config = {"cluster": jobs, "task": task, "environment": "cloud"}
        yield _pod(container, index, TF_CONFIG=json.dumps(tf_config))


def _tf_job():
    return _of_kind("TFJob", "tfjob.yaml")["spec"]["tfReplicaSpecs"]


def _train_job_pods():
    trainer = _of_kind("TrainJob", "trainjob.yaml")["spec"]["trainer"]
    return [_pod(trainer, index) for index in range(trainer["numNodes"])]


class ManifestsTest(parameterized.TestCase):
    def test_indexed_job_is_of_the_schema(self):
        validate = _needs("kubernetes_validate")
        for manifest in _manifests("indexed_job.yaml"):
            for version in "1.29", validate.latest_version():
                validate.validate(manifest, version, strict=True)

    def test_tf_job_is_of_the_schema(self):
        client = _needs("kubeflow.training").ApiClient()
        manifest = _of_kind("TFJob", "tfjob.yaml")
        response = type("Response", (), {"data": json.dumps(manifest)})
        job = client.deserialize(response, "KubeflowOrgV1TFJob")
        self.assertEqual(client.sanitize_for_serialization(job), manifest)

    @parameterized.parameters("TrainingRuntime", "TrainJob")
    def test_train_job_is_of_the_schema(self, kind):
        models = _needs("kubeflow_trainer_api.models")
        manifest = _of_kind(kind, "trainjob.yaml")
        model = getattr(models, f"TrainerV1alpha1{kind}").from_dict(manifest)
        self.assertEqual(model.to_dict(), manifest)

    def test_pods_reach_their_service(self):
        service = _of_kind("Service", "indexed_job.yaml")
        job = _of_kind("Job", "indexed_job.yaml")
        self.assertEqual(service["spec"]["clusterIP"], "None")
        self.assertEqual(
            job["spec"]["template"]["spec"]["subdomain"], service["metadata"]["name"]
        )
        port = service["spec"]["ports"][0]["port"]
        (rule,) = _of_kind("NetworkPolicy", "indexed_job.yaml")["spec"]["ingress"]
        self.assertEqual(rule["ports"], [{"port": port}])
        for _, environ in _indexed_pods() + _train_job_pods():
            for address in cluster.read_tf_config(environ).workers:
                self.assertEndsWith(address, f":{port}")

    @parameterized.named_parameters(
        ("indexed job", _indexed_pods, "digits-{}.digits:2222"),
        ("train job", _train_job_pods, "digits-node-0-{}.digits:2222"),
    )
    def test_tf_config_of_indexed_pods(self, pods, address):
        found = [cluster.read_tf_config(environ) for _, environ in pods()]
        self.assertEqual([c.index for c in found], [0, 1])
        for worker in found:
            self.assertEqual(worker.workers, (address.format(0), address.format(1)))

    def test_tf_config_of_chief_and_workers(self):
        pods = [
            p for kind in ("Chief", "Worker") for p in _tf_job_pods(kind, _tf_job())
        ]
        found = [cluster.read_tf_config(environ) for _, environ in pods]
        self.assertEqual([c.index for c in found], [0, 1, 2])
        self.assertTrue(found[0].workers[0].startswith("digits-chief-0."))

    def test_dynamic_workers_are_refused(self):
        cluster_of_one = {"worker": {"0": "digits-worker-0.default.svc:2222"}, "ps": []}
        task = {"type": "worker", "index": 0}
        tf_config = json.dumps({"sparseCluster": cluster_of_one, "task": task})
        with self.assertRaisesRegex(ValueError, '"cluster" is missing'):
            cluster.read_tf_config({"TF_CONFIG": tf_config})

    @parameterized.parameters("Evaluator", "PS", "Master")
    def test_other_replicas_are_no_workers(self, kind):
        spec = {"Worker": _tf_job()["Worker"], kind: _tf_job()["Chief"]}
        ((_, environ),) = _tf_job_pods(kind, spec)
        remedy = "no evaluators" if kind != "Evaluator" else "takes no part in a swarm"
        with self.assertRaisesRegex(ValueError, remedy):
            cluster.read_tf_config(environ)


@pytest.mark.slow
@pytest.mark.timeout(600)
class PodsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        if reason := machines.why_not():
            self.skipTest(reason)
        self.folder = pathlib.Path(self.enter_context(tempfile.TemporaryDirectory()))

    def start(self, pods):
        """Returns commands of Bash that start pods, one for each."""
        commands = []
        for (program, script, *arguments), environ in pods:
            self.assertEqual(program, "python")
            program = machines.ROOT / _in_image()[script]
            words = [*(f"{k}={v}" for k, v in environ.items()), sys.executable, program]
            words += [a.replace("/shared/", f"{self.folder}/") for a in arguments]
            commands.append("env " + shlex.join(map(str, words)))
        return commands

    def run_pods(self, script, names):
        command = ["bash", "-c", script]
        with machines.network(self.folder, command, names) as process:
            code = process.wait(_SECONDS)
        output = (self.folder / "output").read_text()
        self.assertEqual(code, 0, output)
        return output

    def test_indexed_job_goes_on_after_an_eviction(self):
        first, second = self.start(_indexed_pods())
        output = self.run_pods(
            f"""
            {first} & first=$!
            {second} & second=$!
            until compgen -G '{self.folder}/backups/fit-0/sync-*' > /dev/null; do
                sleep 0.1
            done
            kill -TERM $second
            wait $first; echo first $?
            wait $second; echo second $?
            {first} & first=$!
            {second} & second=$!
            wait $first && wait $second
            """,
            ["digits-0.digits", "digits-1.digits"],
        )
        self.assertIn("first 143\nsecond 143\n", output)
        for index in 0, 1:
            self.assertIn(f"Worker {index} of 2: 15 synchronisations", output)
        self.assertLen(keras.models.load_model(self.folder / "digits.keras").weights, 4)

    def test_tf_job_trains_on_without_a_worker_and_is_evaluated(self):
        spec = _tf_job()
        chief, *workers = self.start(
            [*_tf_job_pods("Chief", spec), *_tf_job_pods("Worker", spec)]
        )
        (evaluator,) = self.start(_tf_job_pods("Evaluator", spec))
        output = self.run_pods(
            f"""
            {evaluator} & evaluator=$!
            {chief} & chief=$!
            {workers[0]} & lost=$!
            {workers[1]} &
            until grep -q ^loss {self.folder}/output; do sleep 0.1; done
            kill -KILL $lost
            wait $lost
            {workers[0]} &
            wait $chief || exit 1
            kill $evaluator
            """,
            [
                "digits-chief-0.default.svc",
                "digits-worker-0.default.svc",
                "digits-worker-1.default.svc",
            ],
        )
        self.assertRegex(output, r"Workers \[1\] left at synchronisation")
        self.assertRegex(output, r"loss 0\.\d+, accuracy 0\.")


def _needs(module):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise absltest.SkipTest(
            f'There is no {module}. Install the extra "engines".'
        ) from None


if __name__ == "__main__":
    absltest.main()
