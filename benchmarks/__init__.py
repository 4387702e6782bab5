"""doratune beside what people run today: kernels, layers and whole models, measured in one process and interleaved."""
