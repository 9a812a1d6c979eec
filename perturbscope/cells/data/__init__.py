"""Reference tables that the library ships; their sources stand in each file."""
