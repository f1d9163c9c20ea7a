"""Other people's drafters: one module a format, read and write."""
