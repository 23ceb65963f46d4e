"""Directories of base models and adapters: what they say, read and written."""
