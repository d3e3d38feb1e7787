"""Registered models; the file name is the registered name."""
