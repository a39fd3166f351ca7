"""Ground truth by retraining: a small model pretrained on real text, and what its sub-models answered."""
