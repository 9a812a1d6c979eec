"""The torch half of the rank family: a BERT over ranked genes."""
