"""`vkv blocks` and the commands that take a zoo, as a user types them."""

import json
from pathlib import Path
from typing import Any

import fine_tunes
import pytest
from typer.testing import CliRunner
from vkv.runtime.blocks.zoo import BlockZoo
from vkv.runtime.cli import main as cli
from vkv.vmem.errors import InvalidConfig, UnknownModel


def _run(*arguments: str | Path, status: int = 0, stdin: str = "") -> str:
    result = CliRunner().invoke(
        cli.app, [str(one) for one in arguments], input=stdin, catch_exceptions=False
    )
    assert result.exit_code == status, result.output
    return result.stdout


def _json(*arguments: str | Path, status: int = 0) -> Any:
    return json.loads(_run(*arguments, "--json", status=status))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("models")
    base = fine_tunes.save_model(home / "base")
    own = fine_tunes.save_tuned(base, home / "own", layers=[1], noise=0.01, also="lm_head")
    return {"base": base, "own": own}


@pytest.fixture
def zoo(folders: dict[str, Path], tmp_path: Path) -> Path:
    _run("blocks", "add", tmp_path / "zoo", folders["base"], f"{folders['own']}=tenant")
    return tmp_path / "zoo"


def test_models_are_added_listed_and_shown(folders: dict[str, Path], zoo: Path) -> None:
    said = _json("blocks", "list", zoo)
    assert [model["name"] for model in said["models"]] == ["base", "tenant"]
    assert said["model_bytes"] == sum(model["num_bytes"] for model in said["models"])
    assert said["saved_bytes"] == said["model_bytes"] - said["kept_bytes"] > 0
    assert all(model["own_bytes"] < model["num_bytes"] for model in said["models"])
    assert "MiB are saved" in " ".join(_run("blocks", "list", zoo).split())
    shown = _json("blocks", "show", zoo, "tenant")
    kinds = [(b["kind"], b["layer"], b["models"]) for b in shown["blocks"]]
    assert kinds[0] == ("embedding", None, ["base", "tenant"])
    assert kinds[-1] == ("head", None, ["tenant"])
    assert "feed-forward of layer 1" in _run("blocks", "show", zoo, "tenant")
    again = _json("blocks", "add", zoo, folders["base"])
    assert [(one["name"], one["num_new"]) for one in again] == [("base", 0)]


def test_models_are_set_beside_each_other(zoo: Path, tmp_path: Path) -> None:
    said = _json("blocks", "diff", zoo, "base", "tenant")
    assert (said["equal"], said["fits"]) == (4, True)
    assert [(b["kind"], b["layer"]) for b in said["different"]] == [
        ("attention", 1),
        ("feed_forward", 1),
        ("head", None),
    ]
    assert "they can run in one batch" in _run("blocks", "diff", zoo, "base", "tenant")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello there\nhow are you?\n")
    found = _json("blocks", "compare", zoo, "base", "tenant", "--prompts", prompts)
    assert found["threshold"] == 0.98
    assert [b["similar"] for b in found["blocks"]] == [True] * 7
    assert 0.98 < found["vocabulary"]["mean"] < 1
    assert "alike" in _run("blocks", "compare", zoo, "base", "tenant")
    with pytest.raises(InvalidConfig, match="cannot read"):
        _run("blocks", "compare", zoo, "base", "tenant", "--prompts", tmp_path / "none")


def test_similar_blocks_are_said_loudly(folders: dict[str, Path], tmp_path: Path) -> None:
    zoo = tmp_path / "zoo"
    _run("blocks", "add", zoo, folders["base"])
    (said,) = _json("blocks", "add", zoo, folders["own"], "--similar", "0.98")
    assert [one["block"] for one in said["approximated"]] == [
        "attention of layer 1",
        "feed-forward of layer 1",
        "head",
    ]
    assert said["new_bytes"] == 0
    assert 0.9 < said["vocabulary"]["mean"] < 1
    (listed,) = (m for m in _json("blocks", "list", zoo)["models"] if m["name"] == "own")
    assert listed["num_approximated"] == 3
    BlockZoo(zoo).remove("own")
    result = CliRunner().invoke(
        cli.app, ["blocks", "add", str(zoo), str(folders["own"]), "--similar", "0.98"]
    )
    assert "own is approximated" in " ".join(result.output.split())


def test_models_are_removed_and_damage_is_found(zoo: Path) -> None:
    assert "all 10 blocks" in _run("blocks", "verify", zoo)
    assert "MiB are free" in _run("blocks", "remove", zoo, "base")
    (head,) = (b for b in BlockZoo(zoo).chain("tenant").blocks if b.kind == "head")
    path = zoo / "blocks" / f"{head.digest}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (what,) = _json("blocks", "verify", zoo, status=1)["damage"]
    assert head.digest in what
    assert "head of tenant" in what
    with pytest.raises(UnknownModel, match="no model 'base'; it has tenant"):
        _run("blocks", "show", zoo, "base")


def test_a_model_of_a_zoo_completes_and_chats(zoo: Path) -> None:
    plain = _run("generate", "hello", "-m", zoo / "models" / "tenant", "--max-tokens", "6")
    assert _run("generate", "hello", "--zoo", zoo, "-m", "tenant", "--max-tokens", "6") == plain
    assert _run("chat", "--zoo", zoo, "-m", "base", "--max-tokens", "4", stdin="hello\n")
    with pytest.raises(UnknownModel, match="it has base, tenant"):
        _run("generate", "hello", "--zoo", zoo, "-m", "nobody")
    with pytest.raises(UnknownModel, match="it has base, tenant"):
        _run("serve", zoo, "--model", "nobody")
