"""`python -m lightning_memdml` is the command `memdml`."""

from lightning_memdml.cli import main

if __name__ == "__main__":
    main()
