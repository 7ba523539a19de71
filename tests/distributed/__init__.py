"""Tests that start several processes, which talk over gloo on the loopback interface."""
