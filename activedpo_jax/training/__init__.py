"""Training: the losses, the optimiser, and the one loop that steps them."""
