"""The rank family: a BERT over ranked genes."""
