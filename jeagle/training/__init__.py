"""Set-up, the step, where features come from, the optimiser, metrics and held-out evaluation."""
