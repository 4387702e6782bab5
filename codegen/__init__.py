"""Specs, configs, GPUs and variants; rendering to source text and compiling to binaries."""
