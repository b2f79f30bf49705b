"""Using what was trained: commands that index, search, export and score."""
