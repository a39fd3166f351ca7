"""Per-example LoRA gradients: output functions, capture, sketch, extractor."""
