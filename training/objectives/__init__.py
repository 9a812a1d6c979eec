"""What a model is trained for: batches, losses and validation."""
