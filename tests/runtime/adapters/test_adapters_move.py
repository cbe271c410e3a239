"""Sequences move between engines with their adapters; one that lacks it takes none."""

import random
from pathlib import Path
from typing import Any

import lora
import migrating
import msgspec
import pytest
import zoo
from transformers import PreTrainedModel
from vkv import SamplingParams
from vkv.runtime.request.spec import AdapterKey, RequestSpec
from vkv.vmem.errors import UnknownAdapter

_NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return zoo.tiny_model("llama")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {
        name: lora.save_adapter(home / name, zoo.tiny_model("llama"), seed=i)
        for i, name in enumerate(_NAMES)
    }


def _load(rig: migrating.Rig, folders: dict[str, Path]) -> dict[str, AdapterKey]:
    for loop in rig.loops.values():
        for name, folder in folders.items():
            loop.load_adapter(name, str(folder))
    adapters = next(iter(rig.loops.values())).engine.extras.adapters
    assert adapters is not None
    return dict(adapters.names)


def _specs(keys: dict[str, AdapterKey], count: int = 12) -> list[RequestSpec]:
    """Of the same prompt half the time, with adapters in turn and without."""
    prompts = zoo.random_prompts([33, 20, 47, 9] * 3)
    chosen: list[AdapterKey | None] = [*keys.values(), None]
    return [
        RequestSpec(
            request_id=str(i),
            prompt_token_ids=prompts[0] if i % 2 else prompts[i],
            params=SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
            adapter=chosen[i % 4],
            seed=i,
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> Any:
    """Tokens of merged models, by adapter and prompt."""
    models: dict[str | None, PreTrainedModel] = {}

    def tokens(spec: RequestSpec) -> list[int]:
        name = None if spec.adapter is None else spec.adapter.name
        if name not in models:
            models[name] = zoo.tiny_model("llama")
            if name is not None:
                lora.merge(models[name], folders[name])
        return zoo.generate_alone(models[name], spec.prompt_token_ids, 20)

    return tokens


@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"kv_memory": "256KiB"}], ids=str)
def test_moves_at_random_steps_keep_adapters(
    model: PreTrainedModel, folders: dict[str, Path], expected: Any, options: dict[str, Any]
) -> None:
    draw = random.Random(0)
    with migrating.rig(model, 3, **options) as rig:
        specs = _specs(_load(rig, folders))
        rig.add(specs)
        while rig.unfinished:
            rig.move_some(draw, 0.3)
            rig.turn()
        rig.finish()
        assert rig.migrations.arbiter.counts.moved >= 8
        for spec in specs:
            stream = rig.streams[spec.request_id, 0]
            assert stream.error is None, stream.error
            assert stream.token_ids == expected(spec), spec.adapter
        for loop in rig.loops.values():
            assert not any(one.num_requests for one in loop.engine.stats().adapters)


def test_an_engine_without_the_adapter_refuses_and_it_goes_on(
    model: PreTrainedModel, folders: dict[str, Path], expected: Any
) -> None:
    with migrating.rig(model, 2) as rig:
        keys = _load(rig, folders)
        rig.loops["b"].unload_adapter("a")
        rig.loops["b"].unload_adapter("b")
        rig.loops["b"].load_adapter("b", str(folders["c"]))  # another of the same name
        specs = [spec for spec in _specs(keys) if spec.adapter in (keys["a"], keys["b"])][:2]
        for spec in specs:
            rig.streams[spec.request_id, 0] = migrating.Stream()
            rig.migrations.add(spec, "a")
        rig.turn()
        for spec in specs:
            rig.migrations.migrate((spec.request_id, 0), "b")
        rig.finish()
        assert rig.migrations.arbiter.counts.moved == 0
        for spec in specs:
            assert rig.streams[spec.request_id, 0].token_ids == expected(spec)


def test_a_request_for_another_adapter_of_the_name_is_refused(
    model: PreTrainedModel, folders: dict[str, Path]
) -> None:
    with migrating.rig(model, 1) as rig:
        keys = _load(rig, folders)
        (spec,) = _specs({"a": AdapterKey("a", "of another file")}, 1)
        with pytest.raises(UnknownAdapter, match="another here than where it was asked for"):
            rig.loops["a"].engine.add(spec)
        assert not rig.loops["a"].engine.has_work
        data = msgspec.msgpack.encode(msgspec.structs.replace(spec, adapter=keys["a"]))
        assert msgspec.msgpack.decode(data, type=RequestSpec).adapter == keys["a"]


def test_sixteen_of_many_ranks_while_all_else_goes_on(llama_folder: Path, tmp_path: Path) -> None:
    """Beside the base, over two engines with packed weights and recorded decodes: sequences move,
    are preempted, copied to host memory and back, and adapters give way to each other."""
    base = zoo.tiny_model("llama")
    folders: dict[str | None, Path] = {
        f"a{i}": lora.save_adapter(tmp_path / f"a{i}", base, rank=8 + 8 * (i % 8), seed=i)
        for i in range(16)
    }
    options: dict[str, Any] = {"kv_memory": "1MiB", "swap_memory": "8MiB", "max_parked": 2}
    draw = random.Random(1)
    with migrating.rig(llama_folder, 2, adapters=folders, **options) as rig:
        adapters = rig.loops["a"].engine.extras.adapters
        assert adapters is not None
        prompts = zoo.random_prompts([30 + number for number in range(20)])
        specs = [
            RequestSpec(
                request_id=str(number),
                prompt_token_ids=prompts[number % 20],
                params=SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
                adapter=None if key is None else key,
                seed=number,
            )
            for number, key in enumerate([*adapters.names.values(), None, None] * 2)
        ]
        rig.add(specs)
        while rig.unfinished:
            rig.move_some(draw, 0.02)
            rig.turn()
        stats = [loop.engine.stats() for loop in rig.loops.values()]
        rig.finish()
        assert rig.migrations.arbiter.counts.moved >= 4
        assert sum(one.num_preemptions for one in stats) > 0
        assert sum(one.swap.fetched.num_moves for one in stats if one.swap is not None) > 0
        assert sum(one.num_replays for one in stats) > 0
    models: dict[str | None, PreTrainedModel] = {None: base}
    for spec in specs:
        name = None if spec.adapter is None else spec.adapter.name
        if name not in models:
            models[name] = zoo.tiny_model("llama")
            lora.merge(models[name], folders[name])
        stream = rig.streams[spec.request_id, 0]
        assert stream.error is None, stream.error
        assert stream.token_ids == zoo.generate_alone(models[name], spec.prompt_token_ids, 40)
