"""Raw search-and-recommendation logs → canonical events → splits → WebDataset shards.

Imports neither `trainer` nor torch: shards can be made and read on a machine that has neither. The format is
in README.md.
"""
