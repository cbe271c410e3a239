"""Paged caches as the CPU backends see them: gather a sequence's blocks, then forget paging."""

import torch


def gather_blocks(
    cache: torch.Tensor, block_table: torch.Tensor, num_tokens: int, first_token: int = 0
) -> torch.Tensor:
    """Copy tokens `[first_token, num_tokens)` of one sequence out of a paged cache.

    Args:
        cache: [num_blocks, block_size, num_kv_heads, head_dim].
        block_table: int32 [max_blocks], the sequence's blocks in order.

    Returns:
        [num_tokens - first_token, num_kv_heads, head_dim]; rows of the last block past the
        length are not part of it.
    """
    block_size = cache.shape[1]
    first_block, skip = divmod(first_token, block_size)
    last_block = -(-num_tokens // block_size)
    blocks = cache.index_select(0, block_table[first_block:last_block])
    return blocks.flatten(0, 1)[skip : skip + num_tokens - first_token]
