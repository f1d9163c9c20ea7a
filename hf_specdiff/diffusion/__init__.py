"""Masked diffusion language models as drafters: not trained for a target, only fitted to its vocabulary."""
