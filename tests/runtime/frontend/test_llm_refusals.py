"""What the front door refuses: each with its type, the value and the remedy."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from vkv import LLM, SamplingParams
from vkv.vmem.errors import (
    BadCheckpoint,
    DriverUnavailable,
    InvalidConfig,
    InvalidPrompt,
    InvalidSamplingParams,
    RequestTooLarge,
    RequestTooLong,
    UnsupportedModel,
    VkvError,
)


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ([1] * 256, None, RequestTooLong, r"256 tokens.*max_len is 256.*raise max_len"),
        ([], None, InvalidPrompt, "no tokens"),
        ("", None, InvalidPrompt, "no tokens"),
        ([5, 96], None, InvalidPrompt, r"token id 96.*\[0, 96\)"),
        ([-1], None, InvalidPrompt, "token id -1"),
        ([1.5], None, InvalidPrompt, "plain integers"),
        ([torch.tensor(3.0)], None, InvalidPrompt, "plain integers"),
        ([True], None, InvalidPrompt, "plain integers"),
        (7, None, InvalidPrompt, "neither"),
        (None, None, InvalidPrompt, "neither"),
        ([1], SamplingParams(stop_token_ids=[96]), InvalidSamplingParams, "stop_token_ids = 96"),
        ([1], SamplingParams(logit_bias={99: 1}), InvalidSamplingParams, "logit_bias = 99"),
        ([1], SamplingParams(logprobs=97), InvalidSamplingParams, "logprobs = 97"),
    ],
)
def test_impossible_requests_are_refused_before_anything_runs(
    llm: LLM, prompt: Any, params: SamplingParams | None, error: type[VkvError], words: str
) -> None:
    with pytest.raises(error, match=words):
        llm.generate(["fine", prompt], params)
    zoo.assert_idle(llm)
    assert llm.stats().num_steps == 0
    assert isinstance(error("x"), ValueError)


def test_what_is_no_batch_is_refused(llm: LLM) -> None:
    for prompts in (None, 5, torch.tensor(1)):
        with pytest.raises(InvalidPrompt, match="prompts is a"):
            llm.generate(prompts)  # type: ignore[arg-type]
    with pytest.raises(InvalidSamplingParams, match="2 sampling parameters for 3 prompts"):
        llm.generate(["a", "b", "c"], [SamplingParams()] * 2)
    with pytest.raises(InvalidSamplingParams, match="temperature"):
        SamplingParams(temperatur=0)  # type: ignore[call-arg]


def test_a_request_the_pool_could_never_hold(llama_folder: Path) -> None:
    options = zoo.with_defaults({"kv_memory": 3 * 4096})
    with LLM(llama_folder, device="cpu", **options) as llm:
        with pytest.raises(RequestTooLarge, match=r"40 prompt.*20 generated.*kv_memory or lower"):
            llm.generate([1] * 40, zoo.greedy(20))
        with pytest.raises(RequestTooLarge):
            llm.generate([1] * 60, SamplingParams(max_tokens=None))
        assert len(llm.generate([1] * 40, zoo.greedy(9))[0].outputs[0].token_ids) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_memory": 4095}, r"4095 bytes holds no page of 4096"),
        ({"kv_memory": "5000", "layers_per_range": 1}, r"cannot hold one of each.*at least 8192"),
        ({"kv_memory": "lots"}, "'lots' is not an amount of memory"),
        ({"kv_memory": 0}, "0 is not an amount"),
        ({"kv_memory": True}, "True is not an amount"),
        ({"max_len": 4096}, r"max_len is 4096.*512 positions.*lower max_len"),
        ({"max_len": 0}, "max_len is 0"),
        ({"max_seqs": None}, "max_seqs is None"),
        ({"max_seqs": True}, "max_seqs is True"),
        ({"max_seqs": 2.0}, "max_seqs is 2.0"),
        ({"max_parked": -1}, "max_parked is -1"),
        ({"page_bytes": "64KiB"}, "page_bytes is '64KiB'"),
        ({"page_bytes": 5000}, "5000"),
        ({"split_kv": 1}, "split_kv is 1"),
        ({"kv": "contiguous"}, "'virtual' or 'paged'"),
        ({"sanitize": "always"}, "sanitize is 'always'"),
        ({"policy": "fifo"}, "policy is 'fifo'"),
        ({"max_seq": 4}, "unknown option 'max_seq': did you mean 'max_seqs'"),
        ({"gpu": 1}, "unknown option 'gpu': known: max_seqs"),
        ({"device": "tpu"}, "'tpu'; use 'auto', 'cpu' or 'cuda'"),
        ({"device": "meta"}, "'meta'; use"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        LLM(zoo.tiny_model("llama"), **{"device": "cpu", **zoo.with_defaults(options)})


def test_a_missing_gpu_is_named() -> None:
    number = torch.cuda.device_count()
    with pytest.raises(DriverUnavailable, match=rf"cuda:{number}.*device='cpu'"):
        LLM(zoo.tiny_model("llama"), device=f"cuda:{number}")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(VkvError, match="flash_atn"):
        LLM(zoo.tiny_model("llama"), device="cpu", attention="flash_atn", **zoo.with_defaults({}))


# -- checkpoints -------------------------------------------------------------------------------


def _broken(folder: Path, path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def _edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config |= changes
    config = {key: value for key, value in config.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))


def _remove(*names: str) -> Any:
    return lambda path: [(path / name).unlink() for name in names]


def _cut(name: str, size: int) -> Any:
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:size])


def _lose_a_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove("config.json"), "no config.json.*point at the folder"),
        (_remove("model.safetensors"), "weights.*check that the checkpoint is complete"),
        (_cut("config.json", 40), "config"),
        (_cut("model.safetensors", 3000), "weights"),
        (_cut("model.safetensors", 4), "weights"),
        (_cut("model.safetensors", 0), "weights"),
        (_cut("tokenizer.json", 50), "tokenizer"),
        (_lose_a_tensor, r"lacks 1 .*model.layers.1.self_attn.k_proj.weight"),
        (lambda path: _edit_config(path, hidden_size=64), "weights.*"),
        (lambda path: _edit_config(path, intermediate_size=32), "weights.*"),
        (lambda path: _edit_config(path, num_hidden_layers=3), "lacks"),
        (lambda path: _edit_config(path, hidden_size="wide"), "config"),
        (lambda path: _edit_config(path, num_attention_heads=0), "config|weights"),
        (lambda path: _edit_config(path, model_type=...), "config"),
        (lambda path: _edit_config(path, model_type="no_such_model"), "no_such_model"),
        (lambda path: (path / "config.json").write_text("[]"), "config"),
    ],
)  # fmt: skip
def test_damaged_checkpoints_are_refused(
    llama_folder: Path, tmp_path: Path, damage: Any, words: str
) -> None:
    path = _broken(llama_folder, tmp_path)
    damage(path)
    with pytest.raises(BadCheckpoint, match=f"(?s){words}"):
        LLM(path, device="cpu", **zoo.with_defaults({}))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nothing-here", "a/b/c"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(BadCheckpoint, match="is not a folder; give a model folder or a hub id"):
        LLM(name, device="cpu")


def test_a_hub_id_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadCheckpoint, match=r"(?s)config of nobody/nothing"):
        LLM("nobody/nothing", device="cpu")


def test_an_architecture_that_generates_no_text(llama_folder: Path, tmp_path: Path) -> None:
    path = _broken(llama_folder, tmp_path)
    (path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UnsupportedModel, match="clip has no causal language model"):
        LLM(path, device="cpu")


def test_recurrent_state_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UnsupportedModel, match="MambaForCausalLM"):
        LLM(tmp_path, device="cpu")


def test_a_checkpoint_without_tokenizer_takes_token_ids(llama_folder: Path, tmp_path: Path) -> None:
    path = _broken(llama_folder, tmp_path)
    _remove("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")(path)
    with LLM(path, device="cpu", **zoo.with_defaults({})) as llm:
        assert llm.tokenizer is None
        assert len(llm.generate([1, 2], zoo.greedy(3))[0].outputs[0].token_ids) == 3


def test_a_missing_chat_template(llama_folder: Path, tmp_path: Path) -> None:
    path = _broken(llama_folder, tmp_path)
    _remove("chat_template.jinja")(path)
    with LLM(path, device="cpu", **zoo.with_defaults({})) as llm:
        with pytest.raises(InvalidPrompt, match=r"no chat template.*generate\(\)"):
            llm.chat([{"role": "user", "content": "hi"}])
        assert llm.generate("hi", zoo.greedy(2))[0].finished
