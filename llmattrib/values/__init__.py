"""Data values of training examples over a validation set."""
