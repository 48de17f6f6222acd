"""Many runs: sweeps, clusters, import."""
