"""DoRA adapters and checkpoints on disk: faults, other trainers' formats, merging. No model is loaded."""
