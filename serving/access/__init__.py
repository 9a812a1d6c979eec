"""Who may ask, and for how much: keys, rights, rates, memory and deadlines, which every call passes first."""
