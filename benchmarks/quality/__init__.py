"""What adapters reach: one small language model, trained from scratch, adapted to another domain in several ways."""
