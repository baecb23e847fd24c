"""`python -m dyncompress` is `dyncompress`."""

from .cli import main

main()
