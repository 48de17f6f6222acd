"""What GenSR is compared with: one file a model. Each ends with `MODEL = Name`; its file's name is
model.name."""
