"""Load and launch kernels; the eager reference that kernels are checked against."""
