"""A zoo keeps what it is given, each block once, whatever happens to whoever adds to it."""

import asyncio
import json
import os
import signal
import subprocess
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fine_tunes
import pytest
import quantized
import torch
import zoo as tiny
from typer.testing import CliRunner
from vkv import LLM, AsyncLLM, SamplingParams
from vkv.runtime.blocks.chain import MANIFEST, Chain
from vkv.runtime.blocks.places import pick
from vkv.runtime.blocks.zoo import BlockZoo
from vkv.runtime.cli.main import app
from vkv.runtime.serving.options import ServeOptions
from vkv.vmem.errors import BadCheckpoint, BadZoo, InvalidConfig, UnknownModel, UnsupportedModel

_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"tie_word_embeddings": True},
    "qwen3_moe": {},
    "gpt2": {"tie_word_embeddings": True},
    "glm4": {},
}


def _check_same_tokens(folder: Path, zoo: BlockZoo, name: str) -> None:
    prompts = tiny.random_prompts((3, 9, 17))
    answers = []
    for source, model in ((folder, None), (zoo, name)):
        with LLM(source, model=model, kv_memory="8MiB", max_len=128, dtype="float32") as llm:
            outputs = llm.generate(prompts, tiny.greedy(12))
            answers.append([output.outputs[0].token_ids for output in outputs])
            defaults = llm.loaded.sampling_defaults, llm.loaded.eos_token_ids
            answers[-1].append(defaults)
    assert answers[0] == answers[1]


# -- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", _MODELS)
def test_what_goes_in_comes_out_to_the_bit(tmp_path: Path, model_type: str) -> None:
    folder = fine_tunes.save_model(tmp_path / "model", model_type, **_MODELS[model_type])
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 7}))
    expected = fine_tunes.contents(folder)
    if model_type == "llama":
        fine_tunes.shard(folder, 3)
    zoo = BlockZoo.create(tmp_path / "zoo")
    added = zoo.add(folder, "one")
    assert fine_tunes.contents_in(zoo, "one") == expected
    assert added.chain.num_bytes == added.new_bytes == sum(len(c[2]) for c in expected.values())
    read = zoo.chain("one").tensors()
    assert {name: (tensor.shape) for name, tensor in read.items()} == {
        name: shape for name, (_, shape, _) in expected.items()
    }
    _check_same_tokens(folder, zoo, "one")


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors"])
def test_four_bits_stay_as_they_are(tmp_path: Path, kind: str) -> None:
    dense = fine_tunes.save_model(tmp_path / "dense", "llama")
    folder, _ = quantized.quantize_folder(dense, tmp_path, kind)
    zoo = BlockZoo.create(tmp_path / "zoo")
    zoo.add(folder, "int4")
    assert fine_tunes.contents_in(zoo, "int4") == fine_tunes.contents(folder)
    other = fine_tunes.save_tuned(folder, tmp_path / "other", layers=[1], only="scale")
    added = zoo.add(other, "other")
    assert added.num_new == 2, "attention and feed-forward of a layer"
    _check_same_tokens(other, zoo, "other")


def test_experts_in_four_bits(tmp_path: Path) -> None:
    dense = fine_tunes.save_model(tmp_path / "dense", "qwen3_moe")
    folder, _ = quantized.quantize_folder(dense, tmp_path, "gptq", group_size=8)
    zoo = BlockZoo.create(tmp_path / "zoo")
    zoo.add(folder, "int4")
    _check_same_tokens(folder, zoo, "int4")


def test_weights_are_mapped_and_not_copied(tmp_path: Path) -> None:
    folder = fine_tunes.save_model(tmp_path / "model")
    zoo = BlockZoo.create(tmp_path / "zoo")
    zoo.add(folder, "one")
    with LLM(zoo, model="one", kv_memory="8MiB", max_len=64, pack_weights=False) as llm:
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        files = {
            range(*(int(end, 16) for end in line[0].split("-"))): line[5]
            for line in maps
            if len(line) > 5 and line[5].startswith(str(zoo.path))
        }
        for name, parameter in llm.loaded.model.named_parameters():
            where = [file for place, file in files.items() if parameter.data_ptr() in place]
            assert len(where) == 1, f"{name} is a copy"
        llm.generate(tiny.random_prompts((20, 30)), tiny.greedy(5))
        memory = _memory_of(zoo.path)
        assert memory
        for taken in memory.values():
            assert taken["Rss:"] > 0
            assert taken["Anonymous:"] == 0, "and nobody has written to them"


def test_processes_share_the_blocks_that_are_equal(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 128}
    base = fine_tunes.save_model(tmp_path / "base", "llama", **sizes)
    own = fine_tunes.save_tuned(base, tmp_path / "own", layers=[1], also="lm_head")
    zoo = BlockZoo.create(tmp_path / "zoo")
    chains = [zoo.add(folder).chain for folder in (base, own)]
    mapped, may_end = os.pipe(), os.pipe()

    def hold() -> None:
        held = _touched(chains[1])
        os.write(mapped[1], b".")
        os.read(may_end[0], 1)
        del held

    pid = _in_child(hold)
    assert os.read(mapped[0], 1) == b"."
    held = _touched(chains[0])
    taken = _memory_of(zoo.path)
    os.write(may_end[1], b".")
    assert os.waitpid(pid, 0)[1] == 0
    for block, is_same in zip(chains[0].blocks, chains[0].same_as(chains[1]), strict=True):
        found = taken[f"{block.digest}.safetensors"]
        assert found["Rss:"] << 10 >= block.num_bytes, "all of it was read"
        assert found["Pss:"] == found["Rss:"] // (2 if is_same else 1), block.place
    assert len(held) == sum(len(block.tensors) for block in chains[0].blocks)


def _touched(chain: Chain) -> dict[str, torch.Tensor]:
    """A model's tensors, mapped and read."""
    tensors = chain.tensors()
    for tensor in tensors.values():
        tensor.sum()
    return tensors


def _memory_of(folder: Path) -> dict[str, Counter[str]]:
    """What this process has of each file in a folder, in KiB, by the names of /proc/self/smaps."""
    found: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            name = Path(rest[-1]).name if str(folder) in line else ""
            counts = found.setdefault(name, Counter())
        elif rest and rest[-1] == "kB":
            counts[first] += int(rest[0])
    found.pop("", None)
    return found


def test_tasks_use_a_model_of_a_zoo(tmp_path: Path) -> None:
    folder = fine_tunes.save_model(tmp_path / "model")
    zoo = BlockZoo.create(tmp_path / "zoo")
    zoo.add(folder, "one")

    async def answer(*source: Any, **options: Any) -> list[int]:
        async with AsyncLLM(*source, **options, kv_memory="8MiB", max_len=64) as llm:
            outputs = [output async for output in llm.generate([1, 2, 3], tiny.greedy(6))]
            return list(outputs[-1].outputs[0].token_ids)

    expected = asyncio.run(answer(folder))
    assert asyncio.run(answer(zoo, model="one")) == expected


def test_a_server_has_the_name_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`serving/test_models.py` has one in processes of its own, of a zoo of several."""
    zoo = BlockZoo.create(tmp_path / "zoo")
    zoo.add(fine_tunes.save_model(tmp_path / "model"), "one")
    told: dict[str, Any] = {}

    def serve(options: ServeOptions, *, model: str, engine: dict[str, Any], **how: Any) -> int:
        told.update(how, names=options.served_model_name, source=model, engine=engine)
        return 0

    monkeypatch.setattr("vkv.runtime.serving.processes.run.serve", serve)
    arguments = [str(zoo.path), "--model", "one", "--kv-memory", "8MiB", "--max-model-len", "64"]
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 0, done.output
    assert told["names"] == ("one",)
    with (
        LLM(told["source"], device=told["device"], dtype=told["dtype"], **told["engine"]) as served,
        LLM(zoo, kv_memory="8MiB", max_len=64) as llm,
    ):
        params = SamplingParams(temperature=0, max_tokens=4)
        outputs = [one.generate("hello", params)[0].outputs[0] for one in (served, llm)]
        assert outputs[0].text == outputs[1].text


def test_a_folder_of_the_zoo_is_a_model_by_itself(tmp_path: Path) -> None:
    folder = fine_tunes.save_model(tmp_path / "model")
    zoo = BlockZoo.create(tmp_path / "zoo")
    zoo.add(folder, "one")
    with LLM(str(zoo.path / "models" / "one"), kv_memory="8MiB", max_len=64) as llm:
        assert llm.tokenizer is not None
        assert llm.generate("hello", tiny.greedy(4))[0].outputs[0].token_ids
    moved = zoo.path.rename(tmp_path / "elsewhere")
    with LLM(moved, kv_memory="8MiB", max_len=64) as llm:  # of one model it needs no name
        assert llm.generate("hello", tiny.greedy(4))[0].outputs[0].token_ids


# -- each block once ---------------------------------------------------------------------------


def test_fine_tunes_take_their_own_bytes_alone(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 24, "hidden_size": 64, "intermediate_size": 128}
    base = fine_tunes.save_model(tmp_path / "base", "llama", **sizes)
    zoo = BlockZoo.create(tmp_path / "zoo")
    zoo.add(base)
    for index in range(10):
        layers = [index, index + 5, index + 9, 23]
        own = tmp_path / f"tenant-{index}"
        fine_tunes.save_tuned(base, own, layers=layers, also="lm_head", seed=index)
        added = zoo.add(own)
        changed = [b for b in added.chain.blocks if b.layer in layers or b.kind == "head"]
        assert (added.num_new, added.new_bytes) == (9, sum(b.num_bytes for b in changed))
    size = zoo.size()
    assert size.num_blocks == 51 + 10 * 9
    assert size.saved_bytes == size.model_bytes - size.kept_bytes > 0.75 * size.model_bytes
    du = subprocess.run(
        ["du", "-s", "--block-size=1", zoo.path / "blocks"], capture_output=True, check=True
    )
    taken = int(du.stdout.split()[0])
    margin = 4096 + 2048  # of each file: what is left of its last page, and its header
    assert size.kept_bytes <= taken <= size.kept_bytes + (size.num_blocks + 2) * margin


def test_equal_layers_of_one_model_are_one(tmp_path: Path) -> None:
    base = fine_tunes.save_model(tmp_path / "base")
    tensors = fine_tunes.load_file(base / "model.safetensors")
    for name in [name for name in tensors if ".layers.0." in name]:
        tensors[name.replace(".0.", ".1.")] = tensors[name].clone()
    fine_tunes.save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    zoo = BlockZoo.create(tmp_path / "zoo")
    zoo.add(base, "twice")
    digests = {(b.kind, b.layer): b.digest for b in zoo.chain("twice").blocks}
    assert digests["attention", 0] == digests["attention", 1]
    assert zoo.size().num_blocks == len(digests) - 2
    _check_same_tokens(base, zoo, "twice")


def test_what_a_removed_model_had_alone_goes(tmp_path: Path) -> None:
    base = fine_tunes.save_model(tmp_path / "base")
    own = fine_tunes.save_tuned(base, tmp_path / "own", layers=[1])
    zoo = BlockZoo.create(tmp_path / "zoo")
    zoo.add(base)
    before = _files(zoo)
    zoo.add(own)
    with LLM(zoo, model="own", kv_memory="8MiB", max_len=64, pack_weights=False) as llm:
        expected = llm.generate([[1, 2, 3]], tiny.greedy(6))[0].outputs[0].token_ids
        assert zoo.remove("own") > 0
        assert _files(zoo) == before
        found = llm.generate([[1, 2, 3]], tiny.greedy(6))[0].outputs[0].token_ids
        assert found == expected, "what was mapped is still there"
    with pytest.raises(UnknownModel, match=r"no model 'own'; it has base"):
        zoo.remove("base", "own")
    assert zoo.models == ("base",)
    zoo.remove("base")
    assert zoo.models == ()
    assert _files(zoo) == {}


def _files(zoo: BlockZoo) -> dict[str, bytes]:
    return {
        str(path.relative_to(zoo.path)): path.read_bytes()
        for path in zoo.path.rglob("*")
        if path.is_file() and path.name != "zoo.json"
    }


# -- names -------------------------------------------------------------------------------------


def test_names_that_are_not_there_or_taken(tmp_path: Path) -> None:
    base = fine_tunes.save_model(tmp_path / "base")
    own = fine_tunes.save_tuned(base, tmp_path / "own", layers=[0])
    zoo = BlockZoo.create(tmp_path / "zoo")
    with pytest.raises(InvalidConfig, match="without models"):
        LLM(zoo)
    zoo.add(base)
    again = zoo.add(base, "base")
    assert (again.num_new, again.new_bytes) == (0, 0)
    with pytest.raises(InvalidConfig, match="another model 'base'; remove that first"):
        zoo.add(own, "base")
    for name in ("", "a/b", "..", ".hidden", "-x"):
        with pytest.raises(InvalidConfig, match="cannot name a model"):
            zoo.add(own, name)
    zoo.add(own)
    with pytest.raises(UnknownModel, match=r"no model 'abc'; it has base, own"):
        LLM(zoo.path, model="abc")
    with pytest.raises(InvalidConfig, match=r"a zoo of 2 models, base, own; say which"):
        pick(zoo.path)
    with pytest.raises(BadZoo, match="is no zoo of blocks"):
        LLM(base, model="own")
    with pytest.raises(InvalidConfig, match="give one of them"):
        LLM(tiny.tiny_model("llama"), model="own")
    with LLM(model=base, kv_memory="8MiB", max_len=64) as llm:
        assert llm.name == str(base)


def test_what_cannot_be_cut_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    zoo = BlockZoo.create(tmp_path / "zoo")
    base = fine_tunes.save_model(tmp_path / "base")
    fine_tunes.shard(base, 2)
    (missing,) = base.glob("*-00002-*")
    kept = missing.read_bytes()
    missing.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(BadCheckpoint, match=r"00002.*would lie in bytes"):
        zoo.add(base)
    missing.unlink()
    with pytest.raises(BadCheckpoint, match="lacks 1 of 2 shards"):
        zoo.add(base)
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"no model\.safetensors"):
        zoo.add(base)
    with pytest.raises(BadCheckpoint, match="is not a folder"):
        zoo.add(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(BadZoo, match="holds other things"):
        BlockZoo.create(tmp_path / "full")
    assert _files(zoo) == {}


# -- what goes wrong ---------------------------------------------------------------------------


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    base = fine_tunes.save_model(tmp_path / "base")
    zoo = BlockZoo.create(tmp_path / "zoo")
    zoo.add(base)
    chain = zoo.chain("base")
    assert zoo.verify() == []
    files = sorted((zoo.path / "blocks").iterdir())
    for index, path in enumerate(files[:3]):
        data = bytearray(path.read_bytes())
        if index == 0:
            data[-1] ^= 1  # a number
        elif index == 1:
            del data[-4:]
        else:
            data[8] ^= 255  # the header
        path.write_bytes(data)
    files[3].unlink()
    tokenizer = zoo.path / "files" / chain.files["tokenizer.json"]
    tokenizer.write_bytes(b"{}")
    damage = zoo.verify()
    assert len(damage) == 5
    for path, what in zip((*files[:4], tokenizer), damage, strict=True):
        assert any(path.name in one for one in damage), what
    assert all("of base" in what for what in damage if "blocks/" in what)
    with pytest.raises(BadCheckpoint):
        LLM(zoo, model="base")
    manifest = zoo.path / "models" / "base" / MANIFEST
    manifest.write_text(manifest.read_text().replace('"layer": 0', '"layer": 1', 1))
    with pytest.raises(BadZoo, match="was changed since it was added"):
        zoo.chain("base")
    zoo.remove("base")
    assert zoo.verify() == []
    assert _files(zoo) == {}


def _in_child(do: Callable[[], None]) -> int:
    """Do it in a forked process; returns its status."""
    if (pid := os.fork()) == 0:
        try:
            do()
        except BaseException:  # noqa: BLE001 - nothing of the test's may run in the child
            os._exit(1)
        os._exit(0)
    return pid


@pytest.mark.parametrize("step", [1, 2, 7, 12, 13])
def test_a_kill_at_any_moment_leaves_nothing_half(tmp_path: Path, step: int) -> None:
    base = fine_tunes.save_model(tmp_path / "base")
    zoo = BlockZoo.create(tmp_path / "zoo")

    def add_and_die() -> None:
        fsync, calls = os.fsync, [0]
        lock = threading.Lock()

        def dying(descriptor: int) -> None:
            with lock:
                calls[0] += 1
                if calls[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        os.fsync = dying
        zoo.add(base)

    _, status = os.waitpid(_in_child(add_and_die), 0)
    assert os.WIFSIGNALED(status), "it was to be killed in the middle"
    assert zoo.models == ()
    assert zoo.verify() == []
    whole = list((zoo.path / "blocks").glob("*.safetensors"))
    expected = {block.digest for block in zoo.draft(base).blocks}
    assert {path.stem for path in whole} <= expected
    zoo.add(base)  # goes on from what is whole, and takes the rest away
    assert fine_tunes.contents_in(zoo, "base") == fine_tunes.contents(base)
    assert zoo.verify() == []
    assert {path.stem for path in (zoo.path / "blocks").iterdir()} == expected
    assert [path.name for path in (zoo.path / "models").iterdir()] == ["base"]


def test_many_may_add_and_remove_at_once(tmp_path: Path) -> None:
    base = fine_tunes.save_model(tmp_path / "base")
    folders = [base]
    for index in range(3):
        own = tmp_path / f"own-{index}"
        folders.append(fine_tunes.save_tuned(base, own, layers=[index % 2], seed=index))
    zoo = BlockZoo.create(tmp_path / "zoo")

    def work(folder: Path) -> None:
        for turn in range(4):
            zoo.add(folder)
            if turn < 3:
                zoo.remove(folder.name)

    children = [_in_child(lambda one=folder: work(one)) for folder in folders]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * len(children)
    assert zoo.models == ("base", "own-0", "own-1", "own-2")
    assert zoo.verify() == []
    for folder in folders:
        assert fine_tunes.contents_in(zoo, folder.name) == fine_tunes.contents(folder)
    used = {block.digest for chain in zoo.chains() for block in chain.blocks}
    assert {path.stem for path in (zoo.path / "blocks").iterdir()} == used


def test_several_that_add_one_model_have_it_once(tmp_path: Path) -> None:
    base = fine_tunes.save_model(tmp_path / "base")
    zoo = BlockZoo.create(tmp_path / "zoo")
    children = [_in_child(lambda: assert_added(zoo, base)) for _ in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    assert zoo.models == ("base",)
    assert fine_tunes.contents_in(zoo, "base") == fine_tunes.contents(base)


def assert_added(zoo: BlockZoo, folder: Path) -> None:
    assert zoo.add(folder).chain.name == folder.name
