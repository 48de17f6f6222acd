"""The collaborative-filtering table of a prepared folder: LightGCN trained, held out, interrupted and read."""
