"""What writes this repository's figures."""
