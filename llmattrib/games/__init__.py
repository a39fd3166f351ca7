"""Cooperative games whose players are training examples."""
