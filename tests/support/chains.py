"""Fine-tunes of a tiny model that differ from it in some blocks, and a zoo of all of them."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import quantized
import torch
import zoo
from transformers import AutoModelForCausalLM, PreTrainedModel
from vkv import LLM, RequestOutput
from vkv.runtime.blocks.zoo import BlockZoo

BASE = "base"
# Parts of the names of what each fine-tune has of its own, in a model of three layers.
LLAMA: Mapping[str, tuple[str, ...]] = {
    "early": ("layers.0.self_attn", "layers.0.input_layernorm"),
    "middle": ("layers.1.", "lm_head"),
    "kin": ("layers.1.", "lm_head", "layers.2.mlp"),  # shares with the one before
    "head": ("lm_head", "model.norm"),  # keys and values are the base's
    "words": ("embed_tokens",),
}
HEAD_ONLY = "head"


def save_family(
    home: Path,
    model_type: str,
    parts: Mapping[str, Sequence[str]],
    *,
    int4: str | None = None,
    **changes: Any,
) -> dict[str, Path]:
    """The folders of a base and its fine-tunes; `int4` quantises all of them by that method."""
    folders: dict[str, Path] = {}
    base = zoo.tiny_model(model_type, **changes).state_dict()
    for name, own in {BASE: (), **parts}.items():
        model = zoo.tiny_model(model_type, **changes)
        for key, value in model.state_dict().items():
            matching = [part for part in own if part in key]
            # By the part, so that fine-tunes which name the same part have the same weights.
            if matching:
                value.copy_(_tuned(base[key], key, matching[0]))
        folders[name] = home / name
        model.save_pretrained(folders[name])
        if int4 is not None:
            folders[name], _ = quantized.quantize_folder(folders[name], home / f"{name}-4", int4)
    return folders


def _tuned(weight: torch.Tensor, key: str, part: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{key} {part}".encode()))
    return (
        weight[torch.randperm(len(weight), generator=generator)]
        if weight.dim() > 1
        else (weight * (0.5 + torch.rand(weight.shape, generator=generator)))
    )


def make_zoo(home: Path, folders: Mapping[str, Path]) -> BlockZoo:
    made = BlockZoo.create(home / "zoo")
    for name, folder in folders.items():
        made.add(folder, name)
    return made


def reference(folder: Path) -> PreTrainedModel:
    """A model as `transformers` runs it."""
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


class Alone:
    """What each model gives run alone."""

    def __init__(self, folders: Mapping[str, Path], **options: Any) -> None:
        self._folders = folders
        self._options = options
        self._llms: dict[str, LLM] = {}

    def tokens(self, name: str, prompt: Sequence[int], count: int) -> list[int]:
        if name not in self._llms:
            self._llms[name] = LLM(self._folders[name], **zoo.with_defaults(self._options))
        (out,) = self._llms[name].generate([list(prompt)], zoo.greedy(count))
        self._llms[name].trim()
        return list(out.outputs[0].token_ids)

    def folder(self, name: str) -> Path:
        return self._folders[name]

    def close(self) -> None:
        for llm in self._llms.values():
            llm.close()


def check_alone(
    outs: Sequence[RequestOutput], names: Sequence[str], alone: Alone
) -> list[list[int]]:
    """Each output is what its model gives alone; returns the tokens."""
    tokens = []
    for out, name in zip(outs, names, strict=True):
        assert out.error is None, (name, out.error)
        tokens.append(list(out.outputs[0].token_ids))
        assert tokens[-1] == alone.tokens(name, out.prompt_token_ids, len(tokens[-1])), name
    return tokens
