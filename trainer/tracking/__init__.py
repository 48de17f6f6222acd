"""Runs in MLflow: what training says (tracker), how it gets there (delivery), where it is kept (store), and
what each node measures (machine)."""
