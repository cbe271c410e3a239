"""Trains the tiny chat model from nothing: tokenizer, curriculum, checkpoints, export.

python -m vkv.tiny_chat.train            # from the start
python -m vkv.tiny_chat.train --resume   # after an interruption
"""

import copy
import json
import math
import os
import random
import time
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import nn
from transformers import (
    AttentionInterface,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from . import model_path
from .batches import Batch, Stage, make_batch
from .dialogues import Mix, training_conversation
from .phrasings import UNKNOWN_ANSWER
from .tokenizer import build_tokenizer

MODEL = model_path()
CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"
TOKENIZER_CONVERSATIONS = 6000
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.3  # of all steps, at the end

CURRICULUM = (
    Stage(
        name="copying", num_steps=1000, num_rows=32, num_tokens=128, copy_share=0.4,
        mix=Mix(filler=0.1, small_talk=0.2, first_facts=(1, 4)),
    ),
    Stage(
        name="short", num_steps=1100, num_rows=16, num_tokens=256, copy_share=0.1, gap_share=0.5,
        mix=Mix(filler=0.3, first_facts=(1, 8)),
    ),
    Stage(
        name="medium", num_steps=1000, num_rows=8, num_tokens=512, copy_share=0.03, gap_share=0.5,
        mix=Mix(first_facts=(2, 16), unknown=1.0, arithmetic=1.5, odd_values=0.4),
    ),
    Stage(
        name="long", num_steps=1100, num_rows=6, num_tokens=1280, gap_share=0.3,
        mix=Mix(
            first_facts=(4, 30), unknown=0.8, arithmetic=1.5, filler=0.8,
            filler_sentences=(1, 12), odd_values=0.4,
        ),
    ),
    Stage(
        name="finish", num_steps=1200, num_rows=6, num_tokens=1280, gap_share=0.3,
        mix=Mix(
            first_facts=(2, 30), unknown=1.5, arithmetic=2.0, small_talk=1.0, filler=0.8,
            filler_sentences=(1, 12), odd_values=0.4, polite=0.25,
            unknown_answer=UNKNOWN_ANSWER,
        ),
    ),
)  # fmt: skip


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the shape of the model: about 1.2 M parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer on training conversations alone."""
    rng = random.Random(f"{seed}-tokenizer")
    exchanges = (
        e for _ in range(TOKENIZER_CONVERSATIONS) for e in training_conversation(rng, Mix(), 120)
    )
    return build_tokenizer([text for e in exchanges for text in (e.user, e.assistant)])


def _attention(
    module: nn.Module,
    query: torch.Tensor,  # [num_rows, num_heads, num_tokens, head_dim]
    key: torch.Tensor,  # [num_rows, num_kv_heads, num_tokens, head_dim]
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention in float32, whose CPU kernel is faster backwards than that of bfloat16."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1).float() for x in (key, value))
    with torch.autocast("cpu", enabled=False):
        out = F.scaled_dot_product_attention(
            query.float(), key, value, is_causal=True, scale=scaling
        )
    return out.transpose(1, 2).to(query.dtype), None


class Trainer:
    """The model, its two optimizers and the step count: all that a checkpoint holds."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        torch.manual_seed(seed)
        AttentionInterface.register("training", _attention)
        self.seed = seed
        self.tokenizer = tokenizer
        config = model_config(tokenizer)
        config._attn_implementation = "training"
        self.model = LlamaForCausalLM(config)
        self.compiled = torch.compile(self.model.model, dynamic=False)
        hidden = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "layers" in n]
        rest = [p for n, p in self.model.named_parameters() if p.ndim < 2 or "layers" not in n]
        self.optimizers = [
            torch.optim.Muon(
                hidden, lr=PEAK_LEARNING_RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.step = 0

    def learning_rate(self) -> float:
        """Warm up, hold, then decay linearly to a twentieth."""
        total = sum(stage.num_steps for stage in CURRICULUM)
        warm = min(1.0, (self.step + 1) / WARMUP_STEPS)
        left = (total - self.step) / (DECAY_SHARE * total)
        return PEAK_LEARNING_RATE * warm * max(0.05, min(1.0, left))

    def train_on(self, batch: Batch) -> tuple[float, float]:
        """Take one step; return the loss and the share of value tokens predicted right."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
        counted = batch.weights > 0
        targets, weights = batch.targets[counted], batch.weights[counted]
        with torch.autocast("cpu", torch.bfloat16):
            states = self.compiled(
                input_ids=batch.ids,
                position_ids=batch.positions,
                attention_mask={"full_attention": None},
                use_cache=False,
            ).last_hidden_state
            logits = self.model.lm_head(states[counted])  # [num_counted, vocab_size]
        losses = F.cross_entropy(logits.float(), targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        right = (logits.argmax(-1) == targets)[batch.is_value[counted]]
        return loss.item(), right.float().mean().item()

    def save(self, path: Path) -> None:
        """Write a checkpoint so that an interruption leaves the old one or the new one."""
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def export(trainer: Trainer, folder: Path) -> None:
    """Write what `from_pretrained` loads: weights rounded to bfloat16, tokenizer, configs."""
    copy.deepcopy(trainer.model).to(torch.bfloat16).save_pretrained(folder)
    trainer.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"  # to compute in, unless the user asks for another
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    GenerationConfig(
        eos_token_id=trainer.tokenizer.eos_token_id,
        pad_token_id=trainer.tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=64,
    ).save_pretrained(folder)


def _stage_at(step: int) -> Stage:
    for stage in CURRICULUM:
        if step < stage.num_steps:
            return stage
        step -= stage.num_steps
    raise ValueError("the curriculum has ended")


def run(trainer: Trainer, checkpoints: Path, console: Console) -> None:
    """Train to the end of the curriculum, with a line in the log every 20 steps."""
    log = checkpoints / "log.jsonl"
    total = sum(stage.num_steps for stage in CURRICULUM)
    started, recent = time.monotonic(), []
    while trainer.step < total:
        stage = _stage_at(trainer.step)
        batch = make_batch(trainer.tokenizer, stage, f"{trainer.seed}-{trainer.step}")
        recent.append(trainer.train_on(batch))
        if trainer.step % 20 == 0:
            loss, accuracy = (
                sum(x for x in column if not math.isnan(x)) / len(column)
                for column in zip(*recent, strict=True)
            )
            seconds = round(time.monotonic() - started, 1)
            record = {
                "step": trainer.step, "stage": stage.name, "loss": round(loss, 4),
                "value_accuracy": round(accuracy, 4), "seconds": seconds,
            }  # fmt: skip
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
            console.print(record)
            recent = []
        if trainer.step % 100 == 0 or trainer.step == total:
            trainer.save(checkpoints / "last.pt")
        if trainer.step == total or _stage_at(trainer.step) != stage:
            trainer.save(checkpoints / f"after-{stage.name}.pt")


def main(
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights, data and tokenizer.")] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    checkpoints: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = CHECKPOINTS,
    out: Annotated[Path, typer.Option(help="Folder for the finished model.")] = MODEL,
) -> None:
    """Train the model and write it to OUT."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)
    checkpoints.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(make_tokenizer(seed), seed)
    if resume:
        trainer.load(checkpoints / "last.pt")
    run(trainer, checkpoints, Console())
    export(trainer, out)


if __name__ == "__main__":
    typer.run(main)
