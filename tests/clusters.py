"""Ray clusters of several nodes on this machine, made and taken apart while a test runs.

Run as a script, this file has the nodes, as real raylets, and does what it reads: a line at a time. Imported, it
starts such a process and talks to it.
"""

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from typing import Any, Self

import pytest

ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # nothing listens beyond the loopback device
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
}


def needed_ray() -> None:
    """Skip a test without Ray, which has no release for every Python; where all is checked that is a failure."""
    if importlib.util.find_spec("ray") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Ray is not installed", pytrace=False)
        pytest.skip("Ray is not installed")


class Nodes:
    """A cluster whose head has no processor for workers; `add` and `lose` nodes of one processor each."""

    def __init__(self) -> None:
        self.environment = {**os.environ, **ENVIRONMENT, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.environment,
            text=True,
            start_new_session=True,
        )
        self.address: str = self._heard()["address"]
        self.nodes: list[str] = []

    def add(self, **resources: float) -> str:
        """A new node; returns its id."""
        node: str = self._ask(do="add", resources={"num_cpus": 1, **resources})["node"]
        self.nodes.append(node)
        return node

    def lose(self, node: str, gracefully: bool = False) -> None:
        """Take a node away, by default at once with everything that runs there."""
        self._ask(do="lose", node=node, gracefully=gracefully)
        self.nodes.remove(node)

    def drain(self, node: str, seconds: float) -> bool:
        """Announce that a node will go, as the machines that may be taken back do."""
        return bool(self._ask(do="drain", node=node, seconds=seconds)["accepted"])

    def _ask(self, **what: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(json.dumps(what), file=self._process.stdin, flush=True)
        return self._heard()

    def _heard(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                heard: dict[str, Any] = json.loads(line)
                return heard
        raise AssertionError("the cluster's process has ended")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _serve() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    _say(address=cluster.address)
    nodes: dict[str, Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "add":
            node = cluster.add_node(object_store_memory=2**27, **asked["resources"])
            nodes[node.node_id] = node
            _say(node=node.node_id)
        elif asked["do"] == "lose":
            cluster.remove_node(nodes.pop(asked["node"]), allow_graceful=asked["gracefully"])
            _say()
        else:
            _say(accepted=_drained(cluster.address, asked["node"], asked["seconds"]))
    cluster.shutdown()


def _drained(address: str, node: str, seconds: float) -> bool:
    import time

    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = GcsClient(address=address)
    accepted, _ = client.drain_node(node, preemption, "taken back", int((time.time() + seconds) * 1000))
    return bool(accepted)


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    _serve()
