"""Measurements of the bundled pair."""
