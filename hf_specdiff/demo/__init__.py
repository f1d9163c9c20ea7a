"""The bundled pair: a real target and drafters for it, trained by this repository's own recipe, and held-out prompts."""
