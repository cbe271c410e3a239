"""What backends over paged caches share: gathering blocks, and refusing blocks of a wrong size."""

import torch

from ..vmem.errors import UnsupportedAttention


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


def check_block_size(name: str, cache: torch.Tensor, multiple: int) -> None:
    """Raise UnsupportedAttention unless the blocks of `cache` suit the kernels of `name`."""
    if cache.shape[1] % multiple:
        raise UnsupportedAttention(
            f"{name}: blocks of {cache.shape[1]} tokens; its kernels want a multiple of "
            f"{multiple} (block_tokens)"
        )
