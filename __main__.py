"""`python -m farspan` is the `farspan` command."""

from .cli import main

main()
