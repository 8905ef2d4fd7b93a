"""AdamW of weights with masks: masked decay, update and packing in one pass."""

from .operator import sparse_adamw_
from .reference import RULES, Rule, adamw_

__all__ = ["RULES", "Rule", "adamw_", "sparse_adamw_"]
