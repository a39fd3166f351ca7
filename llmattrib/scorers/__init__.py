"""Scorers: from features straight to linear representers, without a game."""
