"""Distributed Shampoo with stacked blocks and fast batched inverse roots."""
