"""Registered scorers of `fairseq-generate`; the file name is the registered name."""
