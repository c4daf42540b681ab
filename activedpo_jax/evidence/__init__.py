"""Evidence about candidate pairs: what strategies look at."""
