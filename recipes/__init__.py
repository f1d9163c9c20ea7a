"""How the bundled pair and the published drafters were made."""
