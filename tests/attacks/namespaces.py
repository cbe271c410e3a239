"""A cluster over two machines, made of network namespaces, whose cable is cut.

    python tests/attacks/namespaces.py [--rounds 3] [--cuts blip stream copy]

An instance runs on each. In every round streams run on both, and then

    blip      the cable is cut for less than `liveness_s`: nothing happens but a pause
    stream    it is cut while tokens stream: the survivor goes on with all requests
    copy      it is made slow, and cut in the middle of migrations over it, both ways

Every client must get exactly the tokens of one engine, nothing may be left in the survivor's
memory, the instance cut off must end by itself, and the cluster must grow again once the cable is
mended.
Prints what the longest gaps of clients were.
`tests/runtime/cluster/test_namespaces.py` is its short form. Wants `unshare`, `ip` and `tc`, and
leave to make namespaces.
"""

import argparse
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import two_machines

LIVENESS_S = 3.0
_OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_seqs": 8, "max_len": 1024}
_PROMPTS = [f"Tell me a story about the number {number}." for number in range(6)]
_MAX_TOKENS = 900


class Client(threading.Thread):
    """Streams one prompt, and notes the longest time without a token."""

    def __init__(self, cluster: Any, prompt: str, params: Any) -> None:
        super().__init__(daemon=True)
        self.token_ids: list[int] = []
        self.gap_s = 0.0
        self.error: BaseException | None = None
        self._cluster, self._prompt, self._params = cluster, prompt, params
        self.start()

    def run(self) -> None:
        last_s = time.monotonic()
        try:
            for delta in self._cluster.stream(self._prompt, self._params):
                now_s = time.monotonic()
                if self.token_ids:
                    self.gap_s = max(self.gap_s, now_s - last_s)
                last_s = now_s
                self.token_ids += delta.token_ids
        except BaseException as error:  # noqa: BLE001 - told by `check`
            self.error = error


class Attack:
    """One cluster over both machines, and what is right."""

    def __init__(self) -> None:
        from vkv import LLM, SamplingParams
        from vkv.runtime.cluster.cluster import Cluster
        from vkv.runtime.engine.migration.handshake import Stages

        self.params = SamplingParams(temperature=0, max_tokens=_MAX_TOKENS, ignore_eos=True)
        with LLM(**_OPTIONS) as llm:
            outputs = llm.generate(_PROMPTS, self.params)
        self.right = [list(output.outputs[0].token_ids) for output in outputs]
        self.machines = two_machines.TwoMachines()
        self.cluster = Cluster(
            instances=2,
            policy="round_robin",
            address=self.machines.address,
            threads=1,
            kv_memory="256MiB",
            liveness_s=LIVENESS_S,
            stages=Stages(most=0),
            **_OPTIONS,
        )
        self.here = self._nodes()[two_machines.HEAD]

    def _nodes(self) -> dict[str, str]:
        import ray

        return {n["NodeManagerAddress"]: n["NodeID"] for n in ray.nodes() if n["Alive"]}

    def begin(self) -> list[Client]:
        """Clients whose streams have all begun."""
        clients = [Client(self.cluster, prompt, self.params) for prompt in _PROMPTS]
        while any(len(client.token_ids) < 20 for client in clients):
            assert all(client.error is None for client in clients), clients[0].error
            time.sleep(0.005)
        return clients

    def check(self, clients: list[Client]) -> float:
        """All of them got what one engine says; the longest gap."""
        for client, right in zip(clients, self.right, strict=True):
            client.join(120)
            assert not client.is_alive(), "a stream does not end"
            assert client.error is None, client.error
            assert client.token_ids == right, f"{len(client.token_ids)} other tokens"
        return max(client.gap_s for client in clients)

    def there(self) -> Any:
        """The instance on the other machine."""
        (found,) = [m for m in self.cluster.stats().instances if m.node != self.here]
        return found

    def blip(self) -> str:
        before = self.cluster.stats().num_recomputed
        clients = self.begin()
        self.machines.cut()
        time.sleep(LIVENESS_S / 4)
        self.machines.mend()
        gap_s = self.check(clients)
        assert self.cluster.stats().num_recomputed == before, "it was no blip"
        assert self.there()
        return f"longest gap {gap_s:.2f} s, nothing computed again"

    def stream(self) -> str:
        victim = self.there()
        clients = self.begin()
        self.machines.cut()
        return self._survive(victim, clients)

    def copy(self) -> str:
        """Cut with a stage half-way: what the survivor had goes on there, and is not lost."""
        ids = {member.id for member in self.cluster.stats().instances}
        victim = self.there()
        before = self.cluster.stats()
        clients = self.begin()
        self.machines.slow("400kbit")
        moves = []
        for key, owner in self.cluster.stats().requests.items():
            (target,) = ids - {owner}
            moves.append(threading.Thread(target=self._move, args=(key, target)))
            moves[-1].start()
        time.sleep(0.5)
        self.machines.cut()
        self.machines.fast()
        said = self._survive(victim, clients)
        after = self.cluster.stats()
        num_stayed = after.num_stayed - before.num_stayed
        num_lost = after.num_recomputed - before.num_recomputed
        assert num_stayed, "nothing was on its way"
        said += f", {num_stayed} moves stayed, {num_lost} sequences computed again"
        for move in moves:
            move.join(60)
            assert not move.is_alive(), "a move does not end"
        return said

    def _move(self, key: tuple[str, int], target: int) -> None:
        from vkv.vmem.errors import InvalidOperation

        with suppress(InvalidOperation):  # the target may be gone before it begins
            self.cluster.migrate(key[0], target, index=key[1])

    def _survive(self, victim: Any, clients: list[Client]) -> str:
        began_s = time.monotonic()
        while any(m.id == victim.id for m in self.cluster.stats().instances):
            assert time.monotonic() - began_s < 10 * LIVENESS_S, "it is not noticed"
            time.sleep(0.01)
        noticed_s = time.monotonic() - began_s
        self.machines.mend()  # what the victim has to say would come now
        gap_s = self.check(clients)
        self._check_memory()
        while _is_there(victim.pid):
            assert time.monotonic() - began_s < 10 * LIVENESS_S, "it does not end"
            time.sleep(0.05)
        ended_s = time.monotonic() - began_s
        return (
            f"noticed after {noticed_s:.2f} s, longest gap {gap_s:.2f} s, "
            f"the instance cut off ended after {ended_s:.2f} s"
        )

    def _check_memory(self) -> None:
        """Nobody's keys and values are left."""
        deadline = time.monotonic() + 20
        while True:
            members = self.cluster.stats().instances
            if all(m.stats is not None and not m.stats.kv.tokens_held for m in members):
                return
            assert time.monotonic() < deadline, "memory is lost"
            time.sleep(0.05)

    def grow(self) -> None:
        """Two instances again, and right tokens from both."""
        if len(self.cluster.stats().instances) == 2:
            return
        if two_machines.OTHER not in self._nodes():  # Ray gave the machine up
            self.machines.join()
        self.cluster.scale(2)
        assert self.there()
        self.check(self.begin())

    def close(self) -> None:
        self.cluster.close()
        self.machines.close()


def _is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    cuts = ["blip", "stream", "copy"]
    parser.add_argument("--cuts", nargs="+", choices=cuts, default=cuts)
    given = parser.parse_args()
    if why := two_machines.why_not() if os.getpid() != 1 else None:
        sys.exit(why)
    two_machines.enter()
    began_s = time.monotonic()
    attack = Attack()
    _say(f"two machines and a cluster over both: {time.monotonic() - began_s:.0f} s")
    for number in range(given.rounds):
        for cut in given.cuts:
            attack.grow()
            _say(f"round {number + 1}, {cut}: {getattr(attack, cut)()}")
    attack.close()
    _say(f"all tokens right, {time.monotonic() - began_s:.0f} s")


def _say(what: str) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
