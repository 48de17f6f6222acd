"""The collaborative-filtering table of a prepared folder: how LightGCN is trained, held out and read."""
