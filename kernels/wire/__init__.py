"""The wire: what travels of a masked weight, and operands made of it."""

from .number_operator import codes_of_numbers, numbers_of_codes
from .numbering import CODES, NO_PATTERN
from .operator import from_wire, from_wire_, to_wire, to_wire_
from .pack_operator import pack_wires_, pack_wires_now_

__all__ = [
    "CODES",
    "NO_PATTERN",
    "codes_of_numbers",
    "from_wire",
    "from_wire_",
    "numbers_of_codes",
    "pack_wires_",
    "pack_wires_now_",
    "to_wire",
    "to_wire_",
]
