"""What a Hub repository carries, byte for byte: torch, transformers, the standard library and siblings only."""
