"""A hand-written decoder that batches ragged requests over `vkv.KVCache`, and nothing else of vkv.

    python examples/bring_your_own_model.py

Each request owns a slot: row `slot.index` of `cache.layer(i)`, an ordinary strided tensor of
which the first `slot.num_tokens` tokens are backed by memory. Requests join and leave the batch at
every step; at the end their tokens are compared with those of the decoder without any cache.
"""

from collections import deque
from dataclasses import dataclass

import torch
import vkv
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS, DIM = 256, 128, 4, 8, 2, 16


class Decoder(nn.Module):
    """Tokens [n] at positions [n] to logits [n, VOCAB]; `attend` says what they look back at."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.position = nn.Embedding(512, WIDTH)
        sizes = [(WIDTH, (HEADS + 2 * KV_HEADS) * DIM), (HEADS * DIM, WIDTH)]
        sizes += [(WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(*size, bias=False) for size in sizes) for _ in range(LAYERS)
        )

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        x = self.embed(tokens) + self.position(positions)
        for layer, (qkv, out, up, down) in enumerate(self.blocks):
            heads = qkv(rms_norm(x, (WIDTH,))).unflatten(-1, (-1, DIM))  # [n, heads, DIM]
            x = x + out(attend(layer, *heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)).flatten(1))
            x = x + down(silu(up(rms_norm(x, (WIDTH,)))))
        return rms_norm(x, (WIDTH,)) @ self.embed.weight.T


def causal(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention of the last rows: query [n, HEADS, DIM] over keys, values [m, KV_HEADS, DIM]."""
    seen = torch.ones(len(query), len(keys), dtype=torch.bool).tril(len(keys) - len(query))
    q, k, v = (part.transpose(0, 1) for part in (query, keys, values))
    return scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(0, 1)


@dataclass
class Request:
    tokens: list[int]
    wanted: int  # tokens in the end
    slot: vkv.Slot | None = None


def step(model: Decoder, cache: vkv.KVCache, batch: list[Request]) -> None:
    """One forward over whatever each request has not computed yet: a prompt, or one token."""
    starts = [request.slot.num_tokens for request in batch]
    counts = [len(request.tokens) - start for request, start in zip(batch, starts, strict=True)]
    for request in batch:
        cache.grow(request.slot, len(request.tokens))  # the memory comes here, all or nothing
    rows, positions = cache.locate([request.slot for request in batch], starts, counts)

    def attend(layer, query, key, value):
        keys, values = cache.layer(layer)  # [slots, tokens, KV_HEADS, DIM]
        keys[rows, positions], values[rows, positions] = key, value
        parts = [
            causal(part, *(kv[r.slot.index, : len(r.tokens)] for kv in (keys, values)))
            for part, r in zip(query.split(counts), batch, strict=True)
        ]
        return torch.cat(parts)

    new = [token for r, s in zip(batch, starts, strict=True) for token in r.tokens[s:]]
    logits = model(torch.tensor(new), positions, attend)
    for request, end in zip(batch, torch.tensor(counts).cumsum(0), strict=True):
        request.tokens.append(int(logits[end - 1].argmax()))


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    model = Decoder().eval()
    prompts = [torch.randint(VOCAB, (n,)).tolist() for n in (40, 3, 111, 7, 64, 25)]
    requests = [Request(list(p), len(p) + 20 + 5 * i) for i, p in enumerate(prompts)]
    waiting, running = deque(requests), []
    geometry = vkv.LayerGeometry(num_kv_heads=KV_HEADS, key_dim=DIM, value_dim=DIM)
    layout = vkv.KVLayout((geometry,) * LAYERS, torch.float32, max_len=512, page_bytes=16 << 10)
    with (
        vkv.open_driver("cpu", layout.page_bytes) as driver,
        vkv.KVCache(layout, vkv.PagePool(driver, 4 << 20), num_slots=3) as cache,
    ):
        while waiting or running:
            while waiting and len(running) < cache.num_slots:
                running.append(waiting.popleft())
                running[-1].slot = cache.open()
            step(model, cache, running)
            for request in [r for r in running if len(r.tokens) == r.wanted]:
                cache.close(request.slot)  # its pages go to the next
                running.remove(request)
        stats = cache.stats()
        print(f"{stats.physical_bytes:,} bytes existed, of {stats.virtual_bytes:,} reserved")

    for prompt, request in zip(prompts, requests, strict=True):
        tokens = list(prompt)
        while len(tokens) < request.wanted:
            positions = torch.arange(len(tokens))
            logits = model(torch.tensor(tokens), positions, lambda _, *qkv: causal(*qkv))
            tokens.append(int(logits[-1].argmax()))
        assert tokens == request.tokens, "the cache changed a token"
    print(f"{len(requests)} requests, the tokens of the decoder without a cache")


if __name__ == "__main__":
    main()
