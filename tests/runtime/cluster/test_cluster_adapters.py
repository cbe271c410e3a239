"""A cluster's instances have the same adapters, those that come later included."""

from collections.abc import Iterator
from pathlib import Path

import lora
import pytest
import zoo
from vkv import LLM
from vkv.runtime.cluster.cluster import Cluster
from vkv.vmem.errors import BadAdapter, UnknownAdapter

pytest.importorskip("ray", reason="instances are actors of Ray: pip install 'vkv[cluster]'")

_PROMPTS = zoo.random_prompts([20, 31, 9, 26])
_NAMES = ["a", None, "b", "a"]
_OPTIONS = zoo.with_defaults({"device": "cpu", "dtype": "float32", "max_seqs": 8})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home, model = tmp_path_factory.mktemp("adapters"), zoo.tiny_model("llama")
    return {name: lora.save_adapter(home / name, model, seed=i) for i, name in enumerate("ab")}


@pytest.fixture(scope="module")
def cluster(llama_folder: Path, folders: dict[str, Path]) -> Iterator[Cluster]:
    adapters = {"a": folders["a"]}
    with Cluster(llama_folder, instances=2, threads=1, adapters=adapters, **_OPTIONS) as cluster:
        yield cluster


def _tokens(llm: LLM | Cluster) -> list[tuple[int, ...]]:
    outs = llm.generate(_PROMPTS, zoo.greedy(16), adapter=_NAMES)
    assert not any(out.error for out in outs), [out.error for out in outs]
    return [tuple(out.outputs[0].token_ids) for out in outs]


def test_requests_go_to_where_their_adapter_is_in_memory(
    cluster: Cluster, folders: dict[str, Path]
) -> None:
    cluster.load_adapter("b", folders["b"])
    stream = cluster.stream(_PROMPTS[0], zoo.greedy(100), adapter="a")
    next(stream)  # which keeps one instance busy
    for _ in range(3):
        cluster.generate(_PROMPTS[1:2], zoo.greedy(2), adapter="b")
    for _ in stream:
        pass
    for _ in range(3):  # both are free, and one has it
        cluster.generate(_PROMPTS[1:2], zoo.greedy(2), adapter="b")
    here = [
        {one.name for one in member.stats.adapters if one.is_here}
        for member in cluster.stats().instances
        if member.stats is not None
    ]
    cluster.unload_adapter("b")
    assert sorted(map(sorted, here)) == [["a"], ["b"]]


def test_all_instances_have_the_same(
    cluster: Cluster,
    llama_folder: Path,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with LLM(llama_folder, adapters=folders, **_OPTIONS) as llm:
        expected = _tokens(llm)
    with pytest.raises(UnknownAdapter, match="there are a"):
        _tokens(cluster)
    with monkeypatch.context() as at_home:
        at_home.setenv("HOME", str(folders["b"].parent))
        cluster.load_adapter("b", "~/b")
    assert _tokens(cluster) == expected
    cluster.scale(3)  # which has what was loaded since
    cluster.scale(1)
    assert _tokens(cluster) == expected
    with pytest.raises(BadAdapter, match="no folder"):
        cluster.load_adapter("c", tmp_path / "none")
    cluster.unload_adapter("b")
    with pytest.raises(UnknownAdapter, match="there are a"):
        _tokens(cluster)
