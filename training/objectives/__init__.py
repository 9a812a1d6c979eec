"""The objectives: batches, losses and validation of each stage; may import config, data, families and loop."""
