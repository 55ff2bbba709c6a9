"""Full-batch training of the linear model: a convex objective and its minimiser."""
