"""Tests of the hand-scheduled kernels for Hopper."""
