"""Files of counts to token shards, splits and batches."""
