"""Packed linears: the same results, one product where an input is shared, undone without loss."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import zoo
from quantized import move_to_blobs, round_to_nearest
from torch import nn
from transformers import AutoModelForCausalLM
from vkv import LLM, SamplingParams
from vkv.quant import Int4Linear
from vkv.quant.weight_memory import lies_in
from vkv.runtime.cpu_kernels import kernels as native_kernels
from vkv.runtime.cpu_kernels.packing import (
    PackedLinear,
    can_pack,
    one_dnn_packs,
    pack,
    packed_bytes,
)
from vkv.vmem import linux

DTYPES = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not can_pack(dtype), reason=f"no packed kernels: {dtype}")
    )
    for dtype in (torch.float32, torch.bfloat16)
]


KERNELS = [*DTYPES, pytest.param(None, id="oneDNN")]


@pytest.fixture
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The parameter; oneDNN's kernels in float32 for None, wherever vkv's own are faster."""
    if request.param is not None:
        return request.param
    if not one_dnn_packs(torch.float32):
        pytest.skip("oneDNN packs nothing here")
    monkeypatch.setattr(native_kernels, "best_panel", lambda dtype: None)
    return torch.float32


class Block(nn.Module):
    """Linears that share an input, and some that must not be taken for it."""

    def __init__(self, *, reads_weight: bool = False) -> None:
        super().__init__()
        self.q = nn.Linear(32, 48)
        self.k = nn.Linear(32, 16, bias=False)
        self.v = nn.Linear(32, 24)
        self.out = nn.Linear(88, 32, bias=False)
        self.twice = nn.Linear(32, 32)
        self.unused = nn.Linear(32, 8)
        self.reads_weight = reads_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)
        y = self.twice(self.twice(self.out(joined)) + x)
        return y * self.out.weight.sum() if self.reads_weight else y


@torch.inference_mode()
@pytest.mark.parametrize("dtype", KERNELS, indirect=True)
def test_same_results(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = Block().to(dtype)
    inputs = [torch.randn(*shape, 32).to(dtype) for shape in ((1,), (1, 1), (1, 7), (3, 5))]
    expected = [block(x) for x in inputs]
    packed = pack(block, lambda: [block(inputs[0])])
    called = sum(m.in_features * m.out_features for m in block.modules() if type(m) is PackedLinear)
    biases = (48 + 16 + 24) + 32  # joined, with zeros where there is none
    assert packed == (called + biases) * dtype.itemsize
    assert type(block.unused) is nn.Linear
    rounding = 1e-5 if dtype == torch.float32 else 3e-2
    for x, wanted in zip(inputs, expected, strict=True):
        torch.testing.assert_close(block(x), wanted, atol=rounding, rtol=rounding)


@torch.inference_mode()
@pytest.mark.skipif(not can_pack(torch.float32), reason="no packed kernels")
def test_a_shared_input_is_one_product() -> None:
    block = Block()
    x = torch.randn(1, 32)
    pack(block, lambda: [block(x)])
    assert block.q.product is block.k.product is block.v.product
    assert len({id(m.product) for m in (block.q, block.out, block.twice)}) == 3
    x, y = torch.randn(2, 32), torch.randn(2, 32)
    expected = block.k(x), block.v(y)  # out of order, and inputs that differ
    block.q(y)
    torch.testing.assert_close(block.k(x), expected[0], atol=0, rtol=0)
    torch.testing.assert_close(block.v(y), expected[1], atol=0, rtol=0)
    block(x)
    assert block.q.product._last is None, "the last part lets the input go"


def in_4_bits() -> Block:
    block = Block()
    for name, linear in list(block.named_children()):
        weight = round_to_nearest(linear.weight.detach(), 8, symmetric=True)
        setattr(block, name, Int4Linear(weight, linear.bias))
    return block


@torch.inference_mode()
@pytest.mark.parametrize("settled", [False, True])
def test_4_bit_linears_are_put_back(settled: bool) -> None:
    block = in_4_bits()
    before = dict(block.named_children())
    weights = {name: linear.weight_int4 for name, linear in before.items()}
    if settled:
        for linear in before.values():
            linear.settle(torch.float32)
    x = torch.randn(1, 32)
    expected = block(x)
    outputs = [expected, expected + 1]  # it does not take the packed ones, so it seems

    def run() -> list[torch.Tensor]:
        block(x)
        return [outputs.pop(0)]

    assert pack(block, run) == 0
    torch.testing.assert_close(block(x), expected, atol=0, rtol=0)
    for name, linear in block.named_children():
        assert type(linear) is Int4Linear
        if name in ("out", "twice") or settled:
            assert linear is before[name]
        else:
            assert torch.equal(linear.weight_int4.packed, weights[name].packed)


@torch.inference_mode()
def test_4_bit_linears_keep_only_what_is_read() -> None:
    block = in_4_bits().bfloat16()
    x = torch.randn(1, 32).bfloat16()
    block.out(torch.randn(1, 88))  # a layout for another type
    pack(block, lambda: [block(x)])
    for name in ("out", "twice", "q"):
        product = getattr(block, name).product._product
        chosen = product.kernel_for(x.device, x.dtype, 1).name
        assert product.is_settled
        assert chosen in product._layouts
        assert "dequantize" not in product._layouts or chosen == "dequantize"


@torch.inference_mode()
@pytest.mark.skipif(not can_pack(torch.float32), reason="no packed kernels")
def test_linears_with_hooks_stay() -> None:
    block = Block()
    x = torch.randn(1, 32)
    block.out.register_forward_hook(lambda *_: None)
    assert pack(block, lambda: [block(x)])
    assert type(block.out) is nn.Linear
    assert isinstance(block.q, PackedLinear)


@torch.inference_mode()
@pytest.mark.skipif(not can_pack(torch.float32), reason="no packed kernels")
def test_threads_that_share_a_product_get_their_own_parts() -> None:
    block = Block()
    inputs = [torch.randn(1, 32), torch.randn(1, 32)]
    pack(block, lambda: [block(inputs[0])])
    product = block.q.product
    expected = [[product.compute(x, part).clone() for part in range(3)] for x in inputs]

    def ask(which: int) -> bool:
        with torch.inference_mode():
            return all(
                torch.equal(product.compute(inputs[which], part), expected[which][part])
                for _ in range(2000)
                for part in range(3)
            )

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            assert all(threads.map(ask, range(2)))
    finally:
        sys.setswitchinterval(interval)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", KERNELS, indirect=True)
def test_a_model_that_reads_its_weights_is_put_back(dtype: torch.dtype) -> None:
    block = Block(reads_weight=True).to(dtype)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    x = torch.randn(1, 32, dtype=dtype)
    assert pack(block, lambda: [block(x)]) == 0
    after = block.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert not any(isinstance(module, PackedLinear) for module in block.modules())


@pytest.mark.skipif(not can_pack(torch.float32), reason="no packed kernels")
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        *((name, torch.float32) for name in ("llama", "gemma2", "gpt_oss", "deepseek_v3", "phi3")),
        pytest.param("llama", None, id="llama-oneDNN"),
    ],
    indirect=["dtype"],
)
def test_engine_on_packed_weights(model_type: str, dtype: torch.dtype) -> None:
    """Same tokens; the model that a caller built stays as it was unless told otherwise."""
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    params = SamplingParams(temperature=0, max_tokens=12)
    model = zoo.tiny_model(model_type)
    with LLM(model, pack_weights=None) as llm:
        assert not any(isinstance(m, PackedLinear) for m in model.modules())
        expected = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
        plain_bytes = llm.loaded.weight_bytes
    with LLM(model, pack_weights=True) as llm:
        assert any(isinstance(m, PackedLinear) for m in model.modules())
        assert llm.loaded.weight_bytes >= plain_bytes
        got = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
        bytes_of_packed = llm.loaded.weight_bytes
    assert got == expected
    with LLM(model) as llm:  # as it was left
        assert llm.loaded.weight_bytes == bytes_of_packed


def test_the_built_in_model_is_packed() -> None:
    with LLM(device="cpu") as llm:
        assert (packed_bytes(llm.loaded.model) > 0) == can_pack(llm.loaded.dtype)


@pytest.mark.skipif(not can_pack(torch.float32), reason="no packed kernels")
def test_a_loaded_checkpoint_does_not_stay_twice_in_memory(tmp_path: Path) -> None:
    """Packed weights take the place of the mapped file's, of which only the rest stays."""
    model = zoo.tiny_model("llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=4)
    model.save_pretrained(tmp_path / "model")
    move_to_blobs(tmp_path / "model")
    script = f"""
import vkv
def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssFile"].split()[0]) * 1024
vkv.LLM(device="cpu", max_len=64).close()  # all libraries are loaded by now
before = resident()
llm = vkv.LLM({str(tmp_path / "model")!r}, device="cpu", max_len=64)
from vkv.runtime.cpu_kernels.packing import packed_bytes
print(resident() - before, packed_bytes(llm.loaded.model))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown, packed = map(int, run.stdout.split())
    assert packed > 90 << 20
    assert grown < packed // 2


@pytest.mark.skipif(not can_pack(torch.float32), reason="no packed kernels")
def test_what_a_caller_wrote_over_a_checkpoint_stays(tmp_path: Path) -> None:
    zoo.tiny_model("llama", hidden_size=512, tie_word_embeddings=True).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    embedding = model.get_input_embeddings().weight
    mapped = linux.mapped_files(tmp_path.glob("*.safetensors"))
    assert lies_in(embedding, mapped), "it is the file's memory"
    embedding.data.fill_(0.5)
    with LLM(model, device="cpu", max_len=64, pack_weights=True):
        assert bool((embedding == 0.5).all())


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no packed kernels")
@torch.inference_mode()
def test_logits_may_be_of_another_type() -> None:
    model = zoo.tiny_model("llama").bfloat16()
    ids = torch.tensor([[1, 2, 3]])
    packed = pack(model, lambda: [model.model(ids)[0][0], model(ids).logits[0].float()])
    assert packed > 0


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="no packed kernels")
def test_a_tied_embedding_stays_a_plain_parameter() -> None:
    """Its output layer is packed; to lay it out a second time would be memory for nothing."""
    model = zoo.tiny_model("llama", tie_word_embeddings=True).to(torch.bfloat16)
    with LLM(model, pack_weights=True):
        assert type(model.get_output_embeddings()) is PackedLinear
        assert type(model.get_input_embeddings().weight) is nn.Parameter
