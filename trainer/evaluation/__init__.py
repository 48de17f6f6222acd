"""Ranking events and what comes of it."""
