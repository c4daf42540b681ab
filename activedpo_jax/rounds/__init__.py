"""A round: choose pairs, ask for their labels, learn from them."""
