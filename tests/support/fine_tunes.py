"""Fine-tunes of a tiny model, as folders: some of its layers differ, the rest is the same bytes."""

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import zoo
from safetensors.torch import load_file, save_file
from vkv.runtime.blocks.tensor_file import read_header
from vkv.runtime.blocks.zoo import BlockZoo


def save_model(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A tiny model with the letter tokenizer, as users have it."""
    sizes = {"eos_token_id": zoo.VOCAB_SIZE - 1, **changes}
    zoo.tiny_model(model_type, **sizes).save_pretrained(folder)
    zoo.letter_tokenizer().save_pretrained(folder)
    return folder


def save_tuned(
    base: Path,
    folder: Path,
    *,
    layers: Collection[int] = (),
    also: str = "$^",
    only: str = "",
    seed: int = 1,
    noise: float = 0.3,
) -> Path:
    """A fine-tune of the model in `base`, which is in one file.

    Args:
        layers: whose tensors change.
        also: a pattern of other tensors that do, such as the head's.
        only: a pattern, of tensors in layers, that those must have to change.
        noise: in standard deviations of each tensor.
    """
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        found = re.search(r"\.(?:layers|h)\.(\d+)\.", name)
        in_layer = found is not None and int(found.group(1)) in layers and re.search(only, name)
        if tensor.is_floating_point() and (in_layer or re.search(also, name)):
            drawn = torch.randn(tensor.shape, generator=generator)
            tensors[name] = tensor + (drawn * tensor.float().std() * noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shard(folder: Path, count: int) -> None:
    """Deal the tensors of a model's one file out to several."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {}
    for index in range(count):
        name = f"model-{index + 1:05}-of-{count:05}.safetensors"
        part = {n: tensors[n] for n in sorted(tensors)[index::count]}
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": places}))


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of all tensors in a folder's files, by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        for name, one in read_header(file).items():
            found[name] = one.dtype, one.shape, data[one.start : one.stop]
    return found


def contents_in(zoo: BlockZoo, name: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The same of a model in a zoo, read from its blocks' files."""
    found = {}
    for block in zoo.chain(name).blocks:
        file = zoo.path / "blocks" / f"{block.digest}.safetensors"
        data = file.read_bytes()
        for relative, one in read_header(file).items():
            content = one.dtype, one.shape, data[one.start : one.stop]
            found[f"{block.prefix}{relative}"] = content
    return found
