"""`python -m arrondi` is `arrondi`."""

from arrondi.cli import main

main()
