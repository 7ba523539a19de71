"""Tests of the door and the embedded base."""
