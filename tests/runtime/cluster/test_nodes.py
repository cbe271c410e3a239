"""Instances on two nodes of one Ray cluster: tokens over TCP, keys and values in both ways.

Two of Ray's nodes on this machine stand for two machines: an instance believes Ray.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from served import is_alive
from vkv import LLM, SamplingParams
from vkv.runtime.cluster.cluster import Cluster, ClusterStats
from vkv.runtime.cluster.instances.launcher import Launcher
from vkv.runtime.cluster.members import Member
from vkv.runtime.link.gate import MAGIC
from vkv.runtime.request.outputs import RequestOutput
from vkv.vmem.errors import InvalidConfig, UsageError

ray = pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")

_OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_seqs": 8, "max_len": 1024}
_MORE: dict[str, Any] = {"threads": 1, "liveness_s": 5.0, "kv_memory": "256MiB"}
_PROMPTS = [f"Tell me a story about the number {number}." for number in range(6)]
_LONG = SamplingParams(temperature=0, max_tokens=800, ignore_eos=True)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of a Ray cluster of two nodes, each with room for two instances."""
    from ray.cluster_utils import Cluster as Nodes

    if ray.is_initialized():
        ray.shutdown()
    small = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}
    nodes = Nodes(initialize_head=True, head_node_args=small, shutdown_at_exit=False)
    try:
        nodes.add_node(num_cpus=2, object_store_memory=80 << 20)
        yield nodes.address
    finally:
        if ray.is_initialized():
            ray.shutdown()
        nodes.shutdown()


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """Says what is right."""
    with LLM(**_OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def cluster(address: str) -> Iterator[Cluster]:
    """Three instances: two on a node, one on the other, which is not the front end's or is."""
    with Cluster(
        instances=3, policy="round_robin", address=address, **_OPTIONS, **_MORE
    ) as cluster:
        yield cluster


def _tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


class _Running:
    """A call of `generate` on a thread."""

    def __init__(self, cluster: Cluster) -> None:
        self._outputs: list[RequestOutput] = []
        self._thread = threading.Thread(target=self._run, args=(cluster,))
        self._thread.start()

    def _run(self, cluster: Cluster) -> None:
        self._outputs = cluster.generate(_PROMPTS, _LONG)

    @property
    def is_over(self) -> bool:
        return not self._thread.is_alive()

    def tokens(self) -> list[list[int]]:
        self._thread.join(180)
        assert self.is_over
        return _tokens(self._outputs)


def _until(cluster: Cluster, is_so: Callable[[ClusterStats], bool]) -> ClusterStats:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        stats = cluster.stats()
        if is_so(stats):
            return stats
        time.sleep(0.005)
    raise AssertionError(f"it did not come to that: {cluster.stats()}")


def _is_generating(stats: ClusterStats) -> bool:
    owners = set(stats.requests.values())
    return None not in owners and owners == {member.id for member in stats.instances}


def _by_node(cluster: Cluster) -> dict[str, list[Member]]:
    found: dict[str, list[Member]] = {}
    for member in cluster.stats().instances:
        found.setdefault(member.node, []).append(member)
    return found


def _move(cluster: Cluster, source: Member, target: Member) -> tuple[int, int]:
    """Move whatever the source has to the target; bytes copied and pages handed over."""

    def sums() -> tuple[int, int]:
        members = cluster.stats().instances
        return sum(m.carried_bytes for m in members), sum(m.handed_pages for m in members)

    before = sums()
    num_moved = 0
    for (request_id, index), owner in cluster.stats().requests.items():
        if owner == source.id and not num_moved:
            num_moved += cluster.migrate(request_id, target.id, index=index)
    assert num_moved
    deadline = time.monotonic() + 10
    while sums() == before and time.monotonic() < deadline:  # the next pulse tells
        time.sleep(0.02)
    after = sums()
    return after[0] - before[0], after[1] - before[1]


def test_instances_are_spread_and_tokens_are_those_of_one_engine(
    cluster: Cluster, llm: LLM
) -> None:
    assert sorted(map(len, _by_node(cluster).values())) == [1, 2]
    assert len({instance.node for instance in cluster.router.snapshot().instances}) == 2
    running = _Running(cluster)
    _until(cluster, _is_generating)
    assert running.tokens() == _tokens(llm.generate(_PROMPTS, _LONG))


def test_moves_within_a_node_copy_nothing_and_between_nodes_they_do(
    cluster: Cluster, llm: LLM
) -> None:
    one, two = sorted(_by_node(cluster).values(), key=len)
    running = _Running(cluster)
    _until(cluster, _is_generating)
    copied, handed = _move(cluster, two[0], two[1])
    assert copied == 0
    assert handed > 0
    copied, handed = _move(cluster, two[1], one[0])
    assert copied > 0
    assert handed == 0
    copied, handed = _move(cluster, one[0], two[0])
    assert copied > 0
    assert handed == 0
    assert not running.is_over
    assert running.tokens() == _tokens(llm.generate(_PROMPTS, _LONG))
    assert not cluster.stats().num_recomputed


def _elsewhere(cluster: Cluster) -> list[Member]:
    """Instances that are not on the front end's node."""
    here = ray.get_runtime_context().get_node_id()
    return [member for member in cluster.stats().instances if member.node != here]


def _doors(host: str, pid: int) -> list[int]:
    """Ports of ours that a process listens on: those that say so at once, as Ray's do not."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(descriptor))
        except OSError:
            continue
    lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    listening = [line for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes]
    found = []
    for line in listening:
        port = int(line[1].split(":")[1], 16)
        try:
            with socket.create_connection((host, port), timeout=1) as caller:
                if caller.recv(len(MAGIC), socket.MSG_WAITALL) == MAGIC:
                    found.append(port)
        except OSError:
            continue
    return found


def test_strangers_at_the_ports_harm_nobody(cluster: Cluster, llm: LLM) -> None:
    """Garbage, silence, and more connections than are heard at once."""
    host = ray.util.get_node_ip_address()
    doors = [_doors(host, member.pid) for member in cluster.stats().instances]
    one, two = sorted(_by_node(cluster).values(), key=len)
    elsewhere = {member.id for member in _elsewhere(cluster)}
    expected = [1 + (member.id in elsewhere) for member in cluster.stats().instances]
    assert list(map(len, doors)) == expected  # for keys and values, and for the front end
    with ExitStack() as strangers:
        for port in (port for ports in doors for port in ports):
            for number in range(80):
                stranger = socket.create_connection((host, port), timeout=10)
                strangers.enter_context(stranger)
                with suppress(OSError):  # hung up on
                    stranger.sendall(b"GET / HTTP/1.0\r\n\r\n" * (number % 2 * 10))
        running = _Running(cluster)
        _until(cluster, _is_generating)
        copied, _ = _move(cluster, two[0], one[0])
        assert copied > 0
        assert running.tokens() == _tokens(llm.generate(_PROMPTS, _LONG))


def test_no_secret_is_in_a_command_line_or_in_an_environment(cluster: Cluster) -> None:
    secret = cluster._launcher._place.secret
    assert len(secret) == 32
    for member in cluster.stats().instances:
        for name in ("cmdline", "environ"):
            said = Path(f"/proc/{member.pid}/{name}").read_bytes()
            assert secret not in said
            assert secret.hex().encode() not in said


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_an_instance_of_another_node_that_dies_or_stops_costs_no_token(
    cluster: Cluster, llm: LLM, kind: signal.Signals
) -> None:
    cluster.scale(3)
    victim = _elsewhere(cluster)[0]
    running = _Running(cluster)
    _until(cluster, _is_generating)
    recomputed = cluster.stats().num_recomputed
    os.kill(victim.pid, kind)
    began_s = time.monotonic()
    stats = _until(cluster, lambda stats: victim.id not in {m.id for m in stats.instances})
    assert time.monotonic() - began_s < (1.0 if kind is signal.SIGKILL else 5.0 + 3.0)
    assert len(stats.instances) == 2
    assert running.tokens() == _tokens(llm.generate(_PROMPTS, _LONG))
    assert cluster.stats().num_recomputed > recomputed
    deadline = time.monotonic() + 10
    while is_alive(victim.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(victim.pid)


def test_what_is_not_on_a_node_is_named_with_it(address: str) -> None:
    with pytest.raises(UsageError, match=r"on node \d+\.\d+\.\d+\.\d+: .*nowhere"):
        Cluster("/nowhere/at/all", instances=1, address=address, **_OPTIONS, **_MORE)


@pytest.mark.parametrize(
    ("instances", "threads", "memory_share"), [(1, 2, 0.5), (2, 2, 0.5), (3, 1, 0.25), (9, 1, 0.1)]
)
def test_what_each_node_has_is_parted_among_its_instances(
    address: str, instances: int, threads: int, memory_share: float
) -> None:
    """Two nodes of two CPUs."""
    launcher = Launcher(address)
    try:
        for device in ("cpu", "auto"):
            found = launcher.share(device, instances)
            assert found == {"threads": threads, "memory_share": memory_share}
    finally:
        launcher.close()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"threads": 64}, "needs 64 CPUs and 0 GPUs, and no node"),
        ({"device": "cuda:1"}, "use 'cuda'"),
        ({"device": "cuda"}, "needs a GPU, of which Ray has 0"),
        ({"address": "ray://localhost:10001"}, "ray start"),
    ],
)
def test_what_no_node_has_is_refused(address: str, options: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidConfig, match=why):
        Cluster(**{"address": address, **_OPTIONS, **_MORE, **options})


def test_a_cluster_that_is_not_there_is_named() -> None:
    """In a process of its own, which has joined none yet."""
    program = "import vkv; vkv.Cluster(address='nowhere')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "InvalidConfig: no Ray cluster is joined at address 'nowhere'" in done.stderr


def test_an_instance_whose_front_end_is_gone_ends_itself(address: str) -> None:
    """Hung up on, as when its machine lost power: nobody tells Ray."""
    lonely = Cluster(instances=1, address=address, **_OPTIONS, **_MORE)  # there is room for one
    (member,) = lonely.stats().instances
    assert is_alive(member.pid)
    lonely.router.close()
    deadline = time.monotonic() + 20
    while is_alive(member.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(member.pid)
    lonely.close()
