"""The bundled pair: a real target and drafters for it, trained by this repository's own recipe, and held-out prompts."""

from hf_specdiff.demo.bundle import load_demo
from hf_specdiff.demo.bundle import load_prompts

__all__ = ["load_demo", "load_prompts"]
