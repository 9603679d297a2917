"""`python -m qwench`."""

from qwench.cli import main

main()
