"""`gensr bench`: preparation and loader (data), training and evaluation (model), each beside a fair baseline
of benchmarks/."""
