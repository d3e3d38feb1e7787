"""Registered tasks; the file name is the registered name."""
