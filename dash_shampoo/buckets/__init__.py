"""Buckets and stacks: many small tensors in one. Knows neither optimizers nor process groups."""
