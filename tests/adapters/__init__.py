"""Tests of the entry points for other engines."""
