"""What a run of the command line prints: progress bars, a line after every validation, tables of scores."""
