"""Tests of the operators written in the tile language."""
