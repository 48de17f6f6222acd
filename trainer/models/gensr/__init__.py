"""GenSR (README.md maps its equations to functions)."""
