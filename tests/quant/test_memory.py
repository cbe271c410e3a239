"""Where 4-bit and packed weights lie: memory that goes back, on huge pages."""

import ctypes
import re
from mmap import PAGESIZE
from pathlib import Path

import pytest
import torch
import zoo
from quantized import move_to_blobs, quantize_folder, random_weight
from safetensors.torch import load_file
from vkv import LLM
from vkv.quant import Int4Linear, empty_apart, trim_heap
from vkv.quant.kernels.native import NativeKernel
from vkv.quant.weight_memory import lies_in
from vkv.vmem import linux


def test_memory_apart_is_advised_to_lie_on_huge_pages_and_goes_back() -> None:
    tensor = empty_apart((3 << 20,), torch.int32)
    address = tensor.data_ptr()
    assert address % (2 << 20) == 0
    assert "hg" in _flags_at(address)  # of private memory: that of files has its own rule
    del tensor
    assert _flags_at(address) == []


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc's heap")
def test_holes_in_the_heap_go_back() -> None:
    held = [torch.ones(25 << 10) for _ in range(640)]  # 100 KiB each, every other let go
    held = held[::2]
    before = _resident_bytes()
    trim_heap()
    assert _resident_bytes() < before - (16 << 20)
    assert all(tensor.sum() == 25 << 10 for tensor in held)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc's heap")
def test_settled_weights_leave_nothing_to_give_back() -> None:
    linears = [Int4Linear(random_weight(448, 448, 64, seed=seed)) for seed in range(200)]
    for linear in linears:  # 100 KiB each, on the heap
        linear.settle(torch.bfloat16)
    before = _resident_bytes()
    trim_heap()
    assert before - _resident_bytes() < 4 << 20


@pytest.mark.skipif(NativeKernel.unavailable_reason() is not None, reason="no native kernel here")
def test_codes_lie_on_huge_pages() -> None:
    layout = NativeKernel().prepare(random_weight(4096, 1024, 64))
    assert layout.codes.data_ptr() % (2 << 20) == 0
    assert "hg" in _flags_at(layout.codes.data_ptr())


@pytest.mark.parametrize(("kind", "linked"), [("gptq", True), ("compressed-tensors", False)])
def test_pages_of_a_file_whose_weights_were_read_go_back(
    tmp_path: Path, kind: str, linked: bool
) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 8192}
    zoo.tiny_model("llama", **sizes).save_pretrained(tmp_path / "source")
    folder, _ = quantize_folder(tmp_path / "source", tmp_path, kind, group_size=32)
    if linked:
        move_to_blobs(folder)
    file = (folder / "model.safetensors").resolve()
    codes = sum(t.nbytes for t in load_file(file).values() if t.dtype == torch.int32)
    before = _resident_of(file)
    with LLM(folder, device="cpu", dtype="float32", kv_memory="4MiB") as llm:
        embedding = llm.loaded.model.get_input_embeddings().weight
        assert lies_in(embedding, linux.mapped_files([file])), "or no page would stay"
        assert _resident_of(file) - before < codes // 2


def _resident_of(file: Path) -> int:
    """Bytes of a mapped file's resident pages."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGESIZE


def _flags_at(address: int) -> list[str]:
    """Flags of private memory at an address, of /proc/self/smaps; none where nothing is mapped."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = start <= address < end and line.split()[1].endswith("p")
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []
