"""Tile codes: a mask stored as one int16 per 4×4 tile."""

from .bitwise import count_bits, pack_codes, transpose_codes, unpack_codes

__all__ = ["count_bits", "pack_codes", "transpose_codes", "unpack_codes"]
