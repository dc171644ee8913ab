"""Teach Stable Diffusion your own animals, and prove that it worked."""

__version__ = "0.1.0"
