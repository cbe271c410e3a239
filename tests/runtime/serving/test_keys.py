"""Keys and whose they are: files that are read, and files that are refused."""

from pathlib import Path

import pytest
from vkv.runtime.serving.keys import Key, read_keys, tenant_weights
from vkv.runtime.serving.options import ServeOptions
from vkv.vmem.errors import InvalidConfig


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_a_key_is_a_tenant_of_its_own_unless_the_file_says_whose_it_is(file: Path) -> None:
    file.write_text("# ours\n\nk1\n k2 tenant=ann\nk3\ttenant=bob weight=2.5\nk4 tenant=ann\n")
    keys = read_keys(["k0", "k1"], file)
    assert keys == (
        Key(text="k0", tenant="key-1"),
        Key(text="k1", tenant="key-2"),
        Key(text="k2", tenant="ann"),
        Key(text="k3", tenant="bob", weight=2.5),
        Key(text="k4", tenant="ann"),
    )
    assert tenant_weights(keys) == {"bob": 2.5}


def test_the_options_know_whose_each_key_is(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VKV_API_KEY", "env, k2")
    file.write_text("k2 tenant=ann weight=3\n")
    options = ServeOptions(api_key=("k0",), api_key_file=file)
    index = options.key_index("k2")
    assert index is not None
    assert options.tenants[index] == "ann"
    assert options.keys == ("k0", "env", "k2")
    assert options.tenant_weights == {"ann": 3.0}
    assert "k0" not in repr(options.tenants)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sesame open", "line 1: .* not understood; write KEY"),
        ("sesame tenant=", "not understood"),
        ("sesame tenant=a tenant=b", "not understood"),
        ("sesame name=a", "not understood"),
        ("sesame tenant=a weight=0", "weight is '0'; use a finite number above 0"),
        ("sesame weight=much", "weight is 'much'"),
        ("sesame weight=nan", "finite"),
        ("sesame tenant=a weight=1\nother tenant=a weight=2", "the weights 1 and 2; say one"),
        ("# nothing", "has no key"),
    ],
)
def test_what_is_wrong_is_said_and_no_key_is_shown(file: Path, line: str, words: str) -> None:
    file.write_text(line + "\n")
    with pytest.raises(InvalidConfig, match=words) as error:
        ServeOptions(api_key_file=file)
    assert "sesame" not in str(error.value)
    with pytest.raises(InvalidConfig, match="api_key_file"):
        ServeOptions(api_key_file=file.parent / "nowhere")


def test_an_empty_key_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the environment it means that there is none; on a command line a variable is not set."""
    for given in (["", "k1"], [" "]):
        with pytest.raises(InvalidConfig, match="api_key is empty"):
            ServeOptions(api_key=given)
    monkeypatch.setenv("VKV_API_KEY", "")
    assert ServeOptions().keys == ()
