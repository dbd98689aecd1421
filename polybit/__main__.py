"""`python -m polybit` is the `polybit` command."""

from polybit.cli import main

main()
