"""Estimators: from a game to the values or representers of its players."""
