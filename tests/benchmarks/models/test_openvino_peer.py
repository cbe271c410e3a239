"""The OpenVINO peer over a stand-in for its packages, and what is said where there are none."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from vkv.bench.models.systems import PEERS, commands, has_dense_weights
from vkv.bench.peers.peer import WORKERS, Worker, WorkerFailed

GENAI = """
class SchedulerConfig: pass
class GenerationConfig:
    def set_eos_token_id(self, token): self.eos = token

class Output:
    def __init__(self, tokens): self.generated_ids = tokens

class Handle:
    def __init__(self, prompt, config):
        assert config.ignore_eos and not config.do_sample and config.eos == 10
        self.prompt, self.left, self.new = prompt, config.max_new_tokens, []
    def step(self):
        self.new.append(self.prompt.data[0][-1] + self.left)
        self.left -= 1
    def can_read(self): return bool(self.new)
    def read(self):
        new, self.new = self.new, []
        return {0: Output(new)}

class ContinuousBatchingPipeline:
    def __init__(self, folder, scheduler, device, properties):
        assert scheduler.num_kv_blocks == 100 // 32 + 1 + 3, scheduler.num_kv_blocks
        assert not scheduler.enable_prefix_caching
        assert folder.endswith(("openvino-dense", "openvino-int4")), folder
        assert (properties["KV_CACHE_PRECISION"] == "u8") == folder.endswith("int4")
        self.requests = []
    def add_request(self, number, prompt, config):
        self.requests.append(Handle(prompt, config))
        return self.requests[-1]
    def has_non_finished_requests(self): return any(r.left for r in self.requests)
    def step(self):
        for request in self.requests:
            if request.left: request.step()
"""
INTEL = """
class OVWeightQuantizationConfig:
    def __init__(self, **how): pass
class OVModelForCausalLM:
    def from_pretrained(folder, **how):
        raise ValueError("no such model type")
"""


@contextmanager
def started(folder: Path, monkeypatch: pytest.MonkeyPatch, weights: str) -> Iterator[Worker]:
    """The worker, beside packages in `folder` that stand in for OpenVINO's."""
    packages = folder / "packages"
    for name, source in {
        "openvino_genai": GENAI,
        "openvino": "class Tensor:\n    def __init__(self, data): self.data = data.tolist()\n",
        "optimum": "",
        "optimum/intel": INTEL,
        "openvino_tokenizers": "",
        "nncf": "",
    }.items():
        (packages / name).mkdir(parents=True, exist_ok=True)
        (packages / name / "__init__.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", os.fspath(packages))
    given = {
        "model": str(folder / "model"),
        "scratch": str(folder),
        "weights": weights,
        "dtype": "bfloat16",
        "threads": 1,
        "max_seqs": 3,
        "total_tokens": 100,
    }
    command = [sys.executable, str(WORKERS / PEERS["openvino"])]
    worker = Worker(command, given, folder / "log")
    try:
        yield worker
    finally:
        worker.close()


@pytest.mark.parametrize("weights", ["dense", "int4"])
def test_it_generates_and_says_what(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / f"openvino-{weights}"
    folder.mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"vocab_size": 10, "hidden_size": 20}')
    (folder / "openvino_model.bin").write_bytes(bytes(1000))
    with started(tmp_path, monkeypatch, weights) as worker:
        timing = worker.run([[5], [1, 2], [3]], [4, 2, 3])
        assert timing.first_tokens == [9, 4, 6]
        assert timing.decode_tokens == 3  # until the shortest has its last: one step of all three
        assert timing.weight_bytes == 1000
        assert timing.read_bytes == 1000 - 10 * 20 * (1 if weights == "int4" else 2)


def test_a_model_that_is_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "does not convert .*no such model type.*pip install openvino-genai"
    with pytest.raises(WorkerFailed, match=words), started(tmp_path, monkeypatch, "dense"):
        pass
    assert not (tmp_path / "openvino-dense").exists()


def test_without_its_packages(tmp_path: Path) -> None:
    command = [sys.executable, str(WORKERS / PEERS["openvino"])]
    with pytest.raises(WorkerFailed, match=r"No module named 'openvino.*pip install"):
        Worker(command, {"threads": 1}, tmp_path / "log")


def test_4_bit_forms_come_with_a_format() -> None:
    peers = {"openvino": sys.executable}
    assert list(commands(["vkv"], peers, quant=False)) == ["vkv", "openvino"]
    both = commands(["vkv"], peers, quant=True)
    ours = ["vkv", "vkv-int4", "vkv-int4-head", "vkv-int4-int8"]
    assert list(both) == [*ours, "openvino", "openvino-int4"]
    fewer = commands(["vkv"], peers, quant=True, rounds_inputs=False)
    assert list(fewer) == [*ours[:-1], "openvino", "openvino-int4"]
    assert both["openvino-int4"].own == {"weights": "int4"}
    assert [name for name in both if has_dense_weights(name)] == ["vkv", "openvino"]
