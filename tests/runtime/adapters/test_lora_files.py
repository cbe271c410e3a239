"""What PEFT's folders may say: how it is computed, and what is refused by name."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lora
import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from vkv import LLM
from vkv.runtime.adapters import lora_file
from vkv.vmem.errors import BadAdapter, UsageError

_PROMPT = [3, 14, 15, 9, 26, 5, 35, 8]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(zoo.tiny_model("llama"), device="cpu", **zoo.with_defaults({})) as llm:
        yield llm


def _tokens(llm: LLM, folder: Path) -> list[int]:
    llm.load_adapter("one", folder)
    try:
        (out,) = llm.generate([_PROMPT], zoo.greedy(16), adapter="one")
        assert out.error is None, out.error
        return list(out.outputs[0].token_ids)
    finally:
        llm.unload_adapter("one")


def _merged(folder: Path, scales: dict[str, float] | None = None) -> list[int]:
    model = zoo.tiny_model("llama")
    lora.merge(model, folder, scales)
    return zoo.generate_alone(model, _PROMPT, 16)


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, None),
        ({"rank": 16, "lora_alpha": 16}, None),
        ({"rank": 16, "lora_alpha": 8, "use_rslora": True}, dict.fromkeys(lora.ALL, 8 / 4)),
        (
            {"rank_pattern": {"q_proj": 3, "up_proj": 12}, "lora_alpha": 8},
            {"q_proj": 8 / 3, "up_proj": 8 / 12},
        ),
        (
            {"alpha_pattern": {"o_proj": 4, "down_proj": 32}, "lora_alpha": 8},
            {"o_proj": 4 / 8, "down_proj": 32 / 8},
        ),
        (
            {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"v_proj": 6}, "use_rslora": True},
            {**dict.fromkeys(lora.ALL, 16 / math.sqrt(8)), "v_proj": 6 / 2},
        ),
        ({"layers_to_transform": [1], "layers_pattern": "layers"}, None),
        ({"layers_to_transform": [0]}, None),
        ({"layers_to_transform": []}, None),
        ({"endings": ("down_proj",)}, None),
        ({"endings": ("gate_proj",)}, None),
        ({"endings": ("lm_head", "q_proj")}, None),
        ({"target_modules": r".*\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"}, None),
        ({"target_modules": "all-linear"}, None),
        ({"target_modules": None, "exclude_modules": ["lm_head"]}, None),
        ({"dtype": torch.bfloat16}, None),
        ({"some_new_field": None, "another": False, "third": {}}, None),
    ],
    ids=str,
)
def test_a_config_is_computed_as_peft_does(
    llm: LLM, tmp_path: Path, config: dict[str, Any], scales: dict[str, float] | None
) -> None:
    if config.get("target_modules", "") is None:
        config = {**config, "target_modules": list(lora.ALL)}
    folder = lora.save_adapter(tmp_path / "a", zoo.tiny_model("llama"), **config)
    tokens = _tokens(llm, folder)
    assert tokens == _merged(folder, scales)
    assert tokens != zoo.generate_alone(zoo.tiny_model("llama"), _PROMPT, 16)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True}, "use_dora.*DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.*merge it"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"use_qalora": True}, "QALoRA"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'.*LORA"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights.*base model"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"loftq_config": {"bits": 4}}, "LoftQ"),
        ({"a_field_of_tomorrow": "on"}, "a_field_of_tomorrow = 'on'.*not known"),
        ({"target_modules": []}, "target_modules"),
        ({"r": 0}, "rank is an integer"),
        ({"lora_alpha": 10**400}, "below 1e"),
        ({"target_modules": "(_proj"}, "regular expression"),
        ({"rank_pattern": {"(": 4}}, "regular expression"),
        ({"exclude_modules": "["}, "regular expression"),
        ({"alpha_pattern": [["q_proj", 4]]}, "alpha_pattern"),
        ({"exclude_modules": 5}, "exclude_modules"),
        ({"target_modules": {"q_proj": 1}}, "target_modules"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": 4}, r"down_proj.*\[32, 48\] and by its config of rank 4"),
        ({"target_modules": ["q_proj"]}, "_proj, which its target_modules leave out"),
        ({"target_modules": [*lora.ALL, "lm_head"]}, "lm_head.*no weights for it"),
    ],
    ids=str,
)
def test_what_would_be_computed_otherwise_is_refused_by_name(
    llm: LLM, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    folder = lora.save_adapter(tmp_path / "a", zoo.tiny_model("llama"), **config)
    with pytest.raises(BadAdapter, match=says):
        llm.load_adapter("one", folder)
    assert not llm.stats().adapters


def _change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add tensors to a file, or take them out."""
    path = folder / "adapter_model.safetensors"
    found = {**load_file(path), **tensors}
    save_file({name: one for name, one in found.items() if one is not None}, path)


_Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"{_Q}B.weight": None}, "one of two weights of model.layers.0.self_attn.q_proj"),
        ({f"{_Q}A.weight": torch.zeros(8, 64)}, "trained on this model"),
        ({f"{_Q}A.weight": torch.zeros(8, 32, dtype=torch.int8)}, "I8"),
        ({f"{_Q}magnitude_vector": torch.zeros(32)}, "magnitude_vector"),
        ({"base_model.model.lm_head.weight": torch.zeros(1)}, "lm_head.weight"),
        ({_Q.replace("q_proj", "qq_proj") + "A.weight": torch.zeros(8, 32)}, "qq_proj.*lacks"),
        (
            {"base_model.model.model.layers.0.mlp.experts.1.up_proj.lora_A.weight": torch.ones(8)},
            "an expert of a mixture",
        ),
    ],
    ids=lambda case: next(iter(case))[-40:] if isinstance(case, dict) else "",
)
def test_weights_that_do_not_fit_are_refused(
    llm: LLM, tmp_path: Path, tensors: dict[str, torch.Tensor | None], says: str
) -> None:
    folder = lora.save_adapter(tmp_path / "a", zoo.tiny_model("llama"))
    _change(folder, **tensors)
    with pytest.raises(BadAdapter, match=says):
        llm.load_adapter("one", folder)


def test_what_is_missing_or_damaged_is_refused(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(BadAdapter, match="there is no folder"):
        llm.load_adapter("one", tmp_path / "nothing")
    with pytest.raises(BadAdapter, match="there is no folder"):
        llm.load_adapter("one", "x" * 5000)
    with pytest.raises(BadAdapter, match=r"no .*adapter_config\.json"):
        llm.load_adapter("one", tmp_path)
    folder = lora.save_adapter(tmp_path / "a", zoo.tiny_model("llama"))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BadAdapter, match="cannot be read"):
        llm.load_adapter("one", folder)
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(BadAdapter, match="safe_serialization"):
        llm.load_adapter("one", folder)
    (folder / "adapter_config.json").write_text("[1]")
    with pytest.raises(BadAdapter, match="no fields"):
        llm.load_adapter("one", folder)
    for name in ("", "a\nb", 7, "x" * 300):
        with pytest.raises(UsageError, match="an adapter's name"):
            llm.load_adapter(name, folder)  # type: ignore[arg-type]


def test_a_file_that_changes_is_not_used(llm: LLM, tmp_path: Path) -> None:
    """Loaded, and exchanged before it was needed."""
    folder = lora.save_adapter(tmp_path / "a", zoo.tiny_model("llama"))
    llm.load_adapter("one", folder)
    lora.save_adapter(folder, zoo.tiny_model("llama"), seed=1)
    (out,) = llm.generate([_PROMPT], zoo.greedy(4), adapter="one")
    assert isinstance(out.error, BadAdapter)
    assert "changed since it was loaded" in str(out.error)
    llm.unload_adapter("one")
    assert _tokens(llm, folder) == _merged(folder)
    llm.load_adapter("one", folder)
    (folder / "adapter_model.safetensors").unlink()
    (out,) = llm.generate([_PROMPT], zoo.greedy(4), adapter="one")
    assert "is gone" in str(out.error)
    llm.unload_adapter("one")


def test_a_folder_is_read_while_others_generate(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lora.save_adapter(tmp_path / "a", zoo.tiny_model("llama"))
    reading, may_go_on, digest = threading.Event(), threading.Event(), lora_file._digest

    def slow_digest(folder: Path) -> str:
        reading.set()
        assert may_go_on.wait(60)
        return digest(folder)

    monkeypatch.setattr(lora_file, "_digest", slow_digest)
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(llm.load_adapter, "one", folder)
        assert reading.wait(60)
        (out,) = llm.generate([_PROMPT], zoo.greedy(4))
        assert out.error is None
        assert not loading.done()
        may_go_on.set()
        loading.result()
    monkeypatch.setattr(lora_file, "_digest", None)  # it is known, and is not read again
    llm.load_adapter("two", folder)
    llm.unload_adapter("two")
    llm.unload_adapter("one")
