"""The weights of unfused attention in shared memory: how many bytes they take, and how far tokens are apart."""

from __future__ import annotations

from functools import cache
from itertools import product

from natten.backends.cuda.columns import round_up

_SLOT_BYTES, _PIECE_BYTES, _BANKS, _BANK_BYTES, _MOST_PADDING = 2, 16, 32, 4, 64


def slots_bytes(tokens: int, window: int, pitch: int) -> int:
    """Return the bytes of the weights of consecutive tokens in shared memory, as in tiles.h."""
    loose = round_up(window * _SLOT_BYTES + _PIECE_BYTES - _SLOT_BYTES, _PIECE_BYTES)
    return max(round_up(tokens * pitch + _PIECE_BYTES, _PIECE_BYTES), tokens * loose)


@cache
def slots_pitch(kernel: str, window: int) -> int:
    """Return the distance in bytes between the weights of two tokens in shared memory, with few bank conflicts.

    Args:
        kernel: one of `tiles.UNFUSED_KERNELS`.
        window: number of keys in a window.
    """
    bytes_ = window * _SLOT_BYTES
    if kernel == "logits":  # written as they are in global memory
        return bytes_
    # Weights are as far from a multiple of 16 bytes as in global memory, and tokens do not share such a piece.
    return min(
        range(bytes_ + _PIECE_BYTES, bytes_ + _MOST_PADDING + 1, _PIECE_BYTES),
        key=lambda pitch: _wavefronts(kernel, window, pitch),
    )


def _wavefronts(kernel: str, window: int, pitch: int) -> int:
    """Return the wavefronts of a warp that accesses a weight of 8 tokens and 4 columns, away from borders."""
    words: dict[int, set[int]] = {}
    for token, column in product(range(8), range(0, 8, 2)):
        row, slot = (column, token - column) if kernel == "scatter" else (token, column - token)
        word = (row * pitch + slot * _SLOT_BYTES) // _BANK_BYTES
        words.setdefault(word % _BANKS, set()).add(word)
    return max(map(len, words.values()))
