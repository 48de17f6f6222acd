"""Language models that read a prompt and answer."""
