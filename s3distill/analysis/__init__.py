"""Measurements, training curves and the report."""
