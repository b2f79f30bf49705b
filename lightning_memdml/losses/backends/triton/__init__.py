"""The Triton backend. Importing `kernel` imports Triton, so it is imported where it is used."""
