"""One file per command of `nibble`; service/cli.py imports the one that was asked for."""
