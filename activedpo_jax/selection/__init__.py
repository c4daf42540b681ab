"""Selection: the posterior over the reward (V⁻¹), exact greedy selection, and the strategies."""
