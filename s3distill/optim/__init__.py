"""Registered optimizers; the file name is the registered name."""
