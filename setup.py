"""Makes the package installable with pip; everything about it is said in pyproject.toml."""

from setuptools import setup

setup()
