"""Which units of a site train: scores, budgets and the chosen indices."""
