"""Commands that use a trained network: index, search, export and score."""
