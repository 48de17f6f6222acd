"""Many runs: tables, the paper's evaluation, sweeps, clusters, import; and what they will cost."""
