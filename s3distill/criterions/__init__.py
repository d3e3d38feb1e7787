"""Registered criterions; the file name is the registered name."""
