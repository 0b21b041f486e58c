"""Tests of `tf_psops.cluster`."""

import json
import subprocess
import sys

from absl.testing import absltest, parameterized

from tf_psops import cluster

_WORKERS = ["10.0.0.1:2222", "10.0.0.2:2222"]


def _environ(jobs, task):
    return {"TF_CONFIG": json.dumps({"cluster": jobs, "task": task})}


def _with_address(address):
    return _environ({"worker": [address]}, {"type": "worker", "index": 0})


def _with_task(task):
    return _environ({"worker": _WORKERS}, task)


class SignOfOthersTest(parameterized.TestCase):
    @parameterized.parameters(
        "SLURM_NTASKS",
        "OMPI_COMM_WORLD_SIZE",
        "PMI_SIZE",
        "MV2_COMM_WORLD_SIZE",
        "JSM_NAMESPACE_SIZE",
        "WORLD_SIZE",
    )
    def test_process_manager_tells_of_others(self, name):
        self.assertEqual(cluster.sign_of_others({name: "4"}), f"{name}=4")
        for value in "1", "", "many":
            self.assertIsNone(cluster.sign_of_others({name: value}))

    def test_process_alone(self):
        self.assertIsNone(cluster.sign_of_others({}))


class ReadTfConfigTest(parameterized.TestCase):
    @parameterized.parameters(
        ({},),
        ({"TF_CONFIG": ""},),
        ({"TF_CONFIG": " \n"},),
        ({"TF_CONFIG": "{}"},),
    )
    def test_no_cluster(self, environ):
        self.assertIsNone(cluster.read_tf_config(environ))

    def test_workers(self):
        environ = _with_task({"type": "worker", "index": 1})
        result = cluster.read_tf_config(environ)
        self.assertEqual(result, cluster.Cluster(tuple(_WORKERS), 1))
        self.assertFalse(result.is_chief)

    @parameterized.parameters(("chief", 0, 0), ("worker", 0, 1), ("worker", "1", 2))
    def test_chief_is_first(self, job, index, expected):
        jobs = {"worker": _WORKERS, "chief": ["c:1"]}
        result = cluster.read_tf_config(_environ(jobs, {"type": job, "index": index}))
        self.assertEqual(result.workers, ("c:1", *_WORKERS))
        self.assertEqual(result.index, expected)
        self.assertEqual(result.is_chief, expected == 0)

    @parameterized.parameters("localhost:1", "a-b.example:65535", "[::1]:2222")
    def test_good_address(self, address):
        result = cluster.read_tf_config(_with_address(address))
        self.assertEqual(result.workers, (address,))

    def test_ignores_other_keys(self):
        config = {
            "cluster": {"worker": _WORKERS},
            "task": {"type": "worker", "index": 0},
            "rpc_layer": "grpc",
        }
        result = cluster.read_tf_config({"TF_CONFIG": json.dumps(config)})
        self.assertEqual(result.index, 0)

    @parameterized.named_parameters(
        ("json", {"TF_CONFIG": "{'a': 1}"}, "line 1, column 2", "`json.dumps`"),
        ("not_object", {"TF_CONFIG": "[]"}, "Received: []", '{"cluster": {'),
        ("null", {"TF_CONFIG": "null"}, "Received: None", '{"cluster": {'),
        (
            "no_cluster",
            {"TF_CONFIG": '{"task": {}}'},
            '"cluster" is missing',
            'Expected {"worker": ["host:port", ...]}',
        ),
        (
            "cluster_not_object",
            _environ(_WORKERS, {}),
            f'"cluster" is not an object. Received: {_WORKERS}',
            'Expected {"worker": ["host:port", ...]}',
        ),
        (
            "cluster_empty",
            _environ({}, {}),
            '"cluster" names no job. Received: {}',
            'Expected {"worker": ["host:port", ...]}',
        ),
        (
            "ps",
            _environ({"worker": _WORKERS, "ps": ["p:1"]}, {}),
            "Received: 'ps'",
            "no parameter servers and no evaluators",
        ),
        (
            "addresses_empty",
            _environ({"worker": []}, {}),
            'job "worker" has no list of addresses. Received: []',
            'non-empty list of "host:port"',
        ),
        (
            "addresses_not_list",
            _environ({"worker": "a:1"}, {}),
            "Received: 'a:1'",
            'non-empty list of "host:port"',
        ),
        ("address_number", _with_address(2222), "Received: 2222", "1 to 65535"),
        ("no_port", _with_address("host"), "Received: 'host'", "1 to 65535"),
        ("no_host", _with_address(":80"), "Received: ':80'", "1 to 65535"),
        ("port_0", _with_address("h:0"), "Received: 'h:0'", "1 to 65535"),
        ("port_big", _with_address("h:65536"), "Received: 'h:65536'", "1 to 65535"),
        ("port_word", _with_address("h:http"), "Received: 'h:http'", "1 to 65535"),
        ("ipv6", _with_address("::1:80"), "Received: '::1:80'", "1 to 65535"),
        (
            "duplicate",
            _environ({"chief": ["h:1"], "worker": ["h:1"]}, {}),
            "repeats an address. Received: 'h:1'",
            "an address of its own",
        ),
        (
            "two_chiefs",
            _environ({"chief": ["h:1", "h:2"]}, {}),
            "Received: ['h:1', 'h:2']",
            'move the others to "worker"',
        ),
        (
            "no_task",
            {"TF_CONFIG": json.dumps({"cluster": {"worker": _WORKERS}})},
            '"task" is missing',
            'Expected {"type": "worker", "index": 0}',
        ),
        (
            "task_not_object",
            _with_task("worker"),
            "Received: 'worker'",
            'Expected {"type": "worker", "index": 0}',
        ),
        ("no_type", _with_task({"index": 0}), "Received: None", "one of ['worker']"),
        (
            "unknown_type",
            _with_task({"type": "chief", "index": 0}),
            "Received: 'chief'",
            "one of ['worker']",
        ),
        (
            "type_not_string",
            _with_task({"type": ["worker"], "index": 0}),
            "Received: ['worker']",
            "one of ['worker']",
        ),
        (
            "no_index",
            _with_task({"type": "worker"}),
            "not an integer. Received: None",
            "from 0 to 1",
        ),
        (
            "index_bool",
            _with_task({"type": "worker", "index": True}),
            "not an integer. Received: True",
            "from 0 to 1",
        ),
        (
            "index_float",
            _with_task({"type": "worker", "index": 0.0}),
            "not an integer. Received: 0.0",
            "from 0 to 1",
        ),
        (
            "index_word",
            _with_task({"type": "worker", "index": "one"}),
            "not an integer. Received: 'one'",
            "from 0 to 1",
        ),
        (
            "index_big",
            _with_task({"type": "worker", "index": 2}),
            "out of range. Received: 2",
            "from 0 to 1",
        ),
        (
            "index_negative",
            _with_task({"type": "worker", "index": -1}),
            "out of range. Received: -1",
            "from 0 to 1",
        ),
    )
    def test_bad_config(self, environ, problem, remedy):
        with self.assertRaises(ValueError) as raised:
            cluster.read_tf_config(environ)
        message = str(raised.exception)
        self.assertStartsWith(message, "TF_CONFIG: ")
        self.assertIn(problem, message)
        self.assertIn(remedy, message)

    def test_does_not_need_tensorflow(self):
        program = (
            "import runpy, sys; sys.modules['tensorflow'] = None; "
            f"runpy.run_path({cluster.__file__!r})"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=20)


if __name__ == "__main__":
    absltest.main()
