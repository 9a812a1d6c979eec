"""From files of counts to token shards, splits and batches; of training it may import config only."""
