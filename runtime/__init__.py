"""Loading and launching kernels, and the eager reference they are held to."""
