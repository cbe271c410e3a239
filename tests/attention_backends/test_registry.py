"""Backends by name: what is created, what is chosen, and what a refusal says."""

import json
import subprocess
import sys

import pytest
import torch
from vkv.attention_backends import (
    AttentionNeeds,
    backend_names,
    choose_backend,
    create_backend,
    describe_backends,
    explain_choice,
    native,
)
from vkv.attention_backends.base import Capabilities, missing_features
from vkv.vmem.errors import InvalidConfig, NativeUnavailable, UnsupportedAttention


def needs(**changes) -> AttentionNeeds:
    wanted = {"device": "cpu", "dtype": torch.float32, "head_dims": frozenset({(64, 64)})}
    return AttentionNeeds(**{**wanted, **changes})


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (needs(), "native"),
        (needs(paged=True), "paged_sdpa"),
        (needs(window=True, softcap=True, sinks=True), "native"),
        (needs(dtype=torch.float16), "sdpa"),
    ],
)
def test_auto_on_a_cpu(wanted, expected):
    assert choose_backend(wanted).name == expected
    assert create_backend("auto", wanted).name == expected


def test_without_a_compiler_the_cpu_falls_back(monkeypatch: pytest.MonkeyPatch):
    def missing() -> None:
        raise NativeUnavailable("no C compiler")

    monkeypatch.setattr(native, "library", missing)
    assert choose_backend(needs()).name == "sdpa"
    with pytest.raises(UnsupportedAttention, match="no C compiler"):
        create_backend("native", needs())


def test_a_choice_says_what_it_passed_over():
    assert explain_choice(needs()) == ("native", (), True)
    choice = explain_choice(needs(dtype=torch.float16))
    assert choice.name == "sdpa"
    assert choice.passed_over == (("native", "no torch.float16"),)
    assert explain_choice(needs(dtype=torch.int8)).name is None


def test_by_name():
    assert create_backend("reference", needs()).name == "reference"
    assert create_backend("reference", needs(paged=True)).name == "reference"
    assert create_backend("sdpa", needs(dtype=torch.bfloat16)).name == "sdpa"


def test_unknown_name_lists_the_names():
    with pytest.raises(InvalidConfig, match=r"'spda' is unknown.*reference.*sdpa.*torch_flash"):
        create_backend("spda", needs())


def test_unavailable_says_what_is_needed_and_what_would_do():
    if torch.cuda.is_available():
        pytest.skip("torch_flash is available here")
    with pytest.raises(
        UnsupportedAttention, match=r"'torch_flash'.*needs an NVIDIA GPU.*These can: .*sdpa"
    ):
        create_backend("torch_flash", needs(device="cuda", dtype=torch.bfloat16))


def test_lacking_feature_names_the_value_and_the_alternatives():
    with pytest.raises(UnsupportedAttention, match=r"'sdpa'.*no paged KV.*reference, paged_sdpa"):
        create_backend("sdpa", needs(paged=True))
    with pytest.raises(UnsupportedAttention, match=r"'paged_sdpa'.*reads paged KV only"):
        create_backend("paged_sdpa", needs())


def test_nothing_fits():
    with pytest.raises(UnsupportedAttention, match=r"sdpa: no torch\.int8"):
        choose_backend(needs(dtype=torch.int8))
    with pytest.raises(UnsupportedAttention, match="no backend runs on device 'tpu'"):
        choose_backend(needs(device="tpu"))
    with pytest.raises(UnsupportedAttention, match="No other backend"):
        create_backend("sdpa", needs(dtype=torch.int8))


def test_missing_features_in_words():
    limited = Capabilities(
        devices=frozenset({"cuda"}),
        dtypes=frozenset({torch.bfloat16}),
        max_head_dim=128,
        head_dim_multiple=8,
        unequal_head_dims=False,
        window=False,
        softcap=False,
        sinks=False,
    )
    wanted = needs(
        head_dims=frozenset({(192, 100)}), window=True, softcap=True, sinks=True, paged=True
    )
    assert list(missing_features(limited, wanted)) == [
        "runs on cuda, not cpu",
        "no torch.float32",
        "no paged KV",
        "head size 192 above its 128",
        "head sizes must be multiples of 8, not 192 and 100",
        "unequal head sizes 192 and 100",
        "no window",
        "no softcap",
        "no sinks",
    ]


def test_descriptions_are_plain_data_for_every_name():
    rows = describe_backends()
    assert tuple(row["name"] for row in rows) == backend_names()
    assert json.loads(json.dumps(rows)) == rows
    by_name = {row["name"]: row for row in rows}
    assert by_name["sdpa"]["available"]
    assert by_name["sdpa"]["reason"] is None
    assert "paged" not in by_name["sdpa"]["features"]
    assert all(row["reason"] for row in rows if not row["available"])


def test_naming_a_backend_imports_no_other():
    code = (
        "import sys; import vkv.attention_backends as a; a.backend_names();"
        "loaded = [m for m in sys.modules if m.startswith('vkv.attention_backends.')];"
        "assert not [m for m in loaded if 'sdpa' in m or 'flash' in m], loaded;"
        "assert not {'flash_attn', 'flashinfer', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
