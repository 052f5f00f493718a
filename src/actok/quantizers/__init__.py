"""Quantisers: latents to codes and back, with the gradients, losses and codebook updates of training."""

from actok.quantizers.base import Quantizer
from actok.quantizers.make import make_quantizer
from actok.quantizers.result import Quantised, Usage

__all__ = ["Quantised", "Quantizer", "Usage", "make_quantizer"]
