"""A checkpoint as OpenVINO GenAI reads it, written by Optimum Intel.

    python openvino_model.py FOLDER OUT dense
    python openvino_model.py FOLDER OUT int4

It runs in a process of its own, for the memory that it takes is none of the benchmark's. In 4 bits
linear layers of the decoder have groups of 128, as Optimum Intel recommends; embeddings and output
layer are in 8 bits, as it leaves them.
"""

import json
import sys
from pathlib import Path
from typing import Any

GROUP_SIZE = 128


def write_model(folder: Path, out: Path, weights: str) -> None:
    """The model, and a tokenizer, without which no pipeline begins; `out` is there when all is."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    unfinished = out.with_suffix(".part")
    how: dict[str, Any] = {"load_in_8bit": False}  # which it does on its own to large models
    if weights == "int4":
        how = {"quantization_config": OVWeightQuantizationConfig(bits=4, group_size=GROUP_SIZE)}
    model = OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, **how)
    model.save_pretrained(unfinished)
    _write_tokenizer(folder, unfinished)
    unfinished.replace(out)


def _write_tokenizer(folder: Path, out: Path) -> None:
    """The checkpoint's own, or one of as many made-up words."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    if any(folder.glob("*token*")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = _made_up(json.loads((folder / "config.json").read_text())["vocab_size"])
    for name, model in zip(
        ("tokenizer", "detokenizer"),
        convert_tokenizer(tokenizer, with_detokenizer=True),
        strict=True,
    ):
        openvino.save_model(model, out / f"openvino_{name}.xml")


def _made_up(vocab_size: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", pad_token="w0")


if __name__ == "__main__":
    write_model(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
