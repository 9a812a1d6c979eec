"""Who may ask, how much, and what an uploaded file may hold. See docs/threat-model.md."""
