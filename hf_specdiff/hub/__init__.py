"""Putting drafters on the Hub."""
