"""GenSR as torch modules: a function of Batch, ItemTables and ModelConfig. Knows nothing of ranks, files or MLflow."""
