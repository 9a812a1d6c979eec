"""Published weights, adopted and exported, beside the published extractor."""
