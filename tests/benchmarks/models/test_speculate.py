"""The bench of guesses: its texts, its model, and a run."""

import json
from pathlib import Path

import pytest
import torch
from guessing import guess_restlessly
from vkv import LLM, SamplingParams
from vkv.bench.models.options import SpeculateOptions
from vkv.bench.models.scripts import SCRIPTS, scripted_model, write
from vkv.bench.models.speculate import run
from vkv.vmem.errors import InvalidConfig


def test_no_two_texts_share_a_token_and_the_model_can_say_them() -> None:
    scripts = write(list(SCRIPTS), 4000, 160, 90)
    tokens = [{*script.prompt, *script.said} for script in scripts]
    assert sum(map(len, tokens)) == len(set.union(*tokens))
    assert [len(script.said) for script in scripts] == [90] * len(scripts)
    summary, edited, *_, misleading = scripts
    assert summary.said[:40] == summary.prompt[:40]
    assert summary.said[50:90] == summary.prompt[80:120]
    assert sum(a != b for a, b in zip(edited.said, edited.prompt, strict=False)) == 90 // 25
    text = list(misleading.prompt)
    for start in range(80):
        said = list(misleading.said[start : start + 4])
        places = [i for i in range(len(text)) if text[i : i + 3] == said[:3]]
        assert places
        assert all(text[place + 3] != said[3] for place in places)
    scripted_model("llama-tiny", write(["loop"], 512, 80, 60), dtype=torch.float32)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="512 tokens are too few"):
        write(["quotations"], 512, 2000, 60)
    with pytest.raises(InvalidConfig, match="texts has 'poem'"):
        SpeculateOptions(texts=("poem",))
    with pytest.raises(InvalidConfig, match="drafter is 'oracle'; use ngram"):
        SpeculateOptions(drafter="oracle")


def test_a_run_writes_what_was_guessed(tmp_path: Path) -> None:
    options = SpeculateOptions(
        shape="llama-tiny",
        dtype="float32",
        threads=1,
        texts=("loop", "novel"),
        tokens=60,
        streams=(2,),
        repeats=1,
    )
    path, (table,) = run(options, tmp_path, "vkv bench speculate")
    loop, novel = (
        json.loads(path.read_text())["results"]["texts"][name][1] for name in ("loop", "novel")
    )
    assert loop["accepted"] == loop["drafted"] > 80
    assert loop["steps"] < 20
    assert novel["drafted"] == 0
    assert novel["steps"] >= 59
    assert len(table.rows) == 2


@pytest.mark.parametrize("drafter", ["draft", "surrogate"])
def test_a_run_of_models_that_guess(drafter: str, tmp_path: Path) -> None:
    options = SpeculateOptions(
        shape="llama-tiny",
        draft_shape="llama-tiny",
        dtype="float32",
        threads=1,
        texts=("novel",),
        tokens=40,
        streams=(1,),
        repeats=1,
        drafter=drafter,
        random=drafter == "draft",
    )
    path, (table,) = run(options, tmp_path, "vkv bench speculate")
    assert path.name.startswith(f"speculate-llama-tiny-{drafter}")
    plain, guessing = json.loads(path.read_text())["results"]["texts"]["novel"]
    assert (plain["way"], guessing["way"]) == ("plain", drafter)
    assert len(table.rows) == 1


def test_a_draft_model_errs_as_often_as_it_is_told() -> None:
    (script,) = write(["novel"], 512, 80, 200)
    draft = scripted_model("llama-tiny", [script], dtype=torch.float32, error_rate=0.3)
    model = scripted_model("llama-tiny", [script], dtype=torch.float32)
    with LLM(model, device="cpu", speculative=draft) as llm:
        guess_restlessly(llm, max_tokens=1)  # then each guess is behind a token that is right
        (out,) = llm.generate([list(script.prompt)], SamplingParams(temperature=0, max_tokens=200))
        assert tuple(out.outputs[0].token_ids) == script.said
        stats = llm.stats()
        assert stats.num_drafted > 30
        assert 0.5 < stats.num_accepted / stats.num_drafted < 0.9
