"""Lets `python -m lightning_memdml` run the command `memdml`."""

from lightning_memdml.cli import main

if __name__ == "__main__":
    main()
