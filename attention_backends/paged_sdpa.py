"""The paged baseline: gather a sequence's blocks into a contiguous copy, then attend as `sdpa`.

What contiguous slots are compared with where no paged kernel exists. Sharing the arithmetic with
`sdpa` means that a difference in speed is the cost of paging, and nothing else.
"""

from dataclasses import replace

import torch

from .base import AttentionBatch
from .paged import gather_blocks
from .sdpa import SdpaBackend
from .tiles import SequencePlan


class PagedSdpaBackend(SdpaBackend):
    name = "paged_sdpa"
    capabilities = replace(SdpaBackend.capabilities, contiguous=False, paged=True)

    def _view(self, cache: torch.Tensor, batch: AttentionBatch, plan: SequencePlan) -> torch.Tensor:
        assert batch.block_tables is not None, "a paged backend reads block tables"
        table = batch.block_tables[plan.index]
        gathered = gather_blocks(cache, table, plan.kv_len, plan.first_key)
        return gathered.transpose(0, 1).unsqueeze(0)
