"""`torch_flash` on a CPU: the backend as it is, its kernel replaced by a slow, obvious one.

The kernel believes nothing but the tensors it is given, as the real one under a CUDA graph: the
lengths on the host are upper bounds.
"""

from typing import Any

import pytest
import torch
from vkv.attention_backends import registry
from vkv.attention_backends.base import Capabilities
from vkv.attention_backends.torch_flash import TorchFlashBackend

NAME = "flash_standin"


class FlashStandIn(TorchFlashBackend):
    name = NAME
    capabilities = Capabilities(
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float32}),
        max_head_dim=256,
        head_dim_multiple=8,
        unequal_head_dims=False,
        softcap=False,
        graphs=True,
    )

    @classmethod
    def unavailable_reason(cls) -> str | None:
        return None


def _kernel(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cum_q: torch.Tensor,
    starts: torch.Tensor,
    max_q: int,
    max_k: int,
    *_: Any,
    scale: float,
    window_size_left: int | None,
    window_size_right: int | None,
    seqused_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert int(cum_q.diff().max()) <= max_q
    assert int(seqused_k.max()) <= max_k
    group = query.shape[1] // keys.shape[1]
    outs, lses = [], []
    for index, (start, length) in enumerate(zip(starts.tolist(), seqused_k.tolist(), strict=False)):
        rows = query[int(cum_q[index]) : int(cum_q[index + 1])]
        own = slice(start, start + length)
        k, v = (part[own].repeat_interleave(group, 1) for part in (keys, values))
        logits = torch.einsum("qhd,khd->hqk", rows, k) * scale
        position = torch.arange(length - len(rows), length)[:, None]
        key = torch.arange(length)
        hidden = key > position
        if window_size_left is not None:
            hidden |= key < position - window_size_left
        logits = logits.masked_fill(hidden, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), v))
        lses.append(logits.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.fixture
def flash_standin(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name under which an engine finds the backend."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", _kernel)
    backends = {**registry._BACKENDS, NAME: "flash_standin:FlashStandIn"}
    monkeypatch.setattr(registry, "_BACKENDS", backends)
    return NAME
