"""`python -m qcompiler.cli`."""

from qcompiler.cli.app import main

main()
