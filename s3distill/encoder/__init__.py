"""The speech encoder, for teacher and student alike."""
