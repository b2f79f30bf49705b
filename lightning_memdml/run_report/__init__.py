"""The report of a run: one HTML page with scores, curves, failures, a map, the data and the configuration."""
