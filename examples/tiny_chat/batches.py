"""Turns generated conversations into training batches: token ids, positions and loss weights."""

import random
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from .dialogues import Exchange, Mix, training_conversation
from .smalltalk import SYSTEM_PROMPTS
from .tokenizer import ASSISTANT, END, SPECIAL_TOKENS, SYSTEM, USER

OTHER_ANSWER_WEIGHT = 0.3  # of answer tokens that are not the value asked for
MAX_POSITION = 1900


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of the curriculum: how long, how many rows of how many tokens, and of what."""

    name: str
    num_steps: int
    num_rows: int
    num_tokens: int
    mix: Mix
    copy_share: float = 0.0  # rows of shuffled random chunks instead of conversations
    gap_share: float = 0.0  # rows whose positions jump between turns, to stand for longer ones


@dataclass(frozen=True)
class Batch:
    """Tensors of one step; `weights` says how much predicting the next token counts."""

    ids: torch.Tensor  # [num_rows, num_tokens] int64
    positions: torch.Tensor  # [num_rows, num_tokens] int64
    targets: torch.Tensor  # [num_rows, num_tokens] int64: the next token
    weights: torch.Tensor  # [num_rows, num_tokens] float32
    is_value: torch.Tensor  # [num_rows, num_tokens] bool: the target belongs to a recalled value


@dataclass
class Row:
    """One sequence under construction; lists of equal length."""

    ids: list[int]
    weights: list[float]  # of predicting this token
    is_value: list[bool]
    turn_starts: list[int]


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _find(needle: list[int], haystack: list[int]) -> int:
    """Return where `needle` last begins in `haystack`; it must be there."""
    for start in range(len(haystack) - len(needle), -1, -1):
        if haystack[start : start + len(needle)] == needle:
            return start
    raise ValueError("the value's tokens are not part of the answer's")


def conversation_row(
    tokenizer: PreTrainedTokenizerFast, exchanges: list[Exchange], system: str = ""
) -> Row:
    """Encode a conversation as the chat template does; only answers carry weight."""
    texts = [text for e in exchanges for text in (e.user, e.assistant, e.value)]
    encoded = _encode(tokenizer, texts)
    user, assistant, end = tokenizer.convert_tokens_to_ids([USER, ASSISTANT, END])
    row = Row([], [], [], [])
    if system:
        row.ids = [tokenizer.convert_tokens_to_ids(SYSTEM), *_encode(tokenizer, [system])[0], end]
        row.weights, row.is_value = [0.0] * len(row.ids), [False] * len(row.ids)
    for i in range(len(exchanges)):
        question, answer, value = encoded[3 * i : 3 * i + 3]
        row.turn_starts.append(len(row.ids))
        head = [user, *question, end, assistant]
        weights = [OTHER_ANSWER_WEIGHT] * (len(answer) + 1)
        is_value = [False] * (len(answer) + 1)
        if value:
            start = _find(value, answer)
            weights[start : start + len(value)] = [1.0] * len(value)
            if exchanges[i].kind == "ask":
                is_value[start : start + len(value)] = [True] * len(value)
        row.ids += [*head, *answer, end]
        row.weights += [0.0] * len(head) + weights
        row.is_value += [False] * len(head) + is_value
    return row


def copying_row(rng: random.Random, vocab_size: int, num_tokens: int) -> Row:
    """Random chunks of tokens, then the same chunks in another order: lookup by context."""
    row = Row([], [], [], [])
    while len(row.ids) < num_tokens:
        num_chunks = rng.randint(2, max(2, num_tokens // 10))
        chunks = [
            [rng.randrange(len(SPECIAL_TOKENS), vocab_size) for _ in range(rng.randint(3, 6))]
            for _ in range(num_chunks)
        ]
        known = rng.choice((1, 2, 2))  # tokens of a chunk that identify it
        for weight in (0.0, 1.0):
            rng.shuffle(chunks)
            for chunk in chunks:
                row.turn_starts.append(len(row.ids))
                row.ids += chunk
                row.weights += [0.0] * known + [weight] * (len(chunk) - known)
    row.is_value = [False] * len(row.ids)
    return row


def _positions(rng: random.Random, row: Row, num_tokens: int, *, gaps: bool) -> list[int]:
    """Return positions 0, 1, 2, …, with jumps at some turns if `gaps`."""
    jumps = [0] * num_tokens
    if gaps:
        budget = rng.randint(0, MAX_POSITION - num_tokens)
        starts = [start for start in row.turn_starts if 0 < start < num_tokens]
        num_jumps = min(len(starts), rng.randint(1, 6))
        cuts = sorted(rng.randint(0, budget) for _ in range(num_jumps))
        for start, low, high in zip(rng.sample(starts, num_jumps), [0, *cuts], cuts, strict=False):
            jumps[start] += high - low
    positions, position = [], -1
    for jump in jumps:
        position += 1 + jump
        positions.append(position)
    return positions


def make_batch(tokenizer: PreTrainedTokenizerFast, stage: Stage, seed: str) -> Batch:
    """Return the batch that belongs to `seed`; the same seed gives the same batch."""
    rng = random.Random(seed)
    n = stage.num_tokens
    rows, positions = [], []
    for _ in range(stage.num_rows):
        if rng.random() < stage.copy_share:
            row = copying_row(rng, len(tokenizer), n + 1)
        else:
            system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.15 else ""
            row = conversation_row(tokenizer, training_conversation(rng, stage.mix, n), system)
        rows.append(row)
        positions.append(_positions(rng, row, n, gaps=rng.random() < stage.gap_share))
    return Batch(
        ids=torch.tensor([row.ids[:n] for row in rows]),
        positions=torch.tensor(positions),
        targets=torch.tensor([row.ids[1 : n + 1] for row in rows]),
        weights=torch.tensor([row.weights[1 : n + 1] for row in rows]),
        is_value=torch.tensor([row.is_value[1 : n + 1] for row in rows]),
    )
