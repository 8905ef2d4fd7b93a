"""Packing: a weight and a mask in, the operands of sparse products out."""

from .cpu import empty_packed
from .operator import pack_tiles, pack_tiles_, search_and_pack, search_and_pack_, unpack_rows
from .sides import Side

__all__ = ["Side", "empty_packed", "pack_tiles", "pack_tiles_", "search_and_pack", "search_and_pack_", "unpack_rows"]
