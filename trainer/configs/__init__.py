"""Presets: one YAML file each, with a header that says launch line, memory and expected time."""
