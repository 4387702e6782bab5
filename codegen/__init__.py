"""From a spec and a config to source text and binaries; what the kernels and the GPUs are."""
