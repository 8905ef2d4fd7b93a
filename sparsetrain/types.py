"""Words that several parts of the library share: phases, weight products, targets of the masked decay."""

from typing import Literal

PhaseKind = Literal["dense", "sparse", "frozen"]
"""dense: no mask; sparse: the mask is refreshed while training; frozen: the mask is fixed."""

WeightProduct = Literal["dense", "mvue"]
"""How the weight gradient is computed: dense, or from an unbiased 2:4 estimate of the output gradient."""

DecayTarget = Literal["gradient", "weight", "by_optimizer", "share"]
"""gradient: ``g += λ·(1-M)⊙W``; weight: ``W -= lr·λ·(1-M)⊙W``; by_optimizer: on weights with SGD, else on gradients;
share: ``W -= λ·(1-M)⊙W``, a share of the weight in every step, whatever the learning rate."""
