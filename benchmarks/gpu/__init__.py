"""Parts of benchmarks/gpu_session.sh: what is measured while a GPU is at hand (docs/gpu.md)."""
