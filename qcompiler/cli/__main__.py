"""`python -m qcompiler.cli`."""

from qcompiler.cli import main

main()
