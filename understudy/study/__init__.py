"""Comparing runs by what their directories say."""
