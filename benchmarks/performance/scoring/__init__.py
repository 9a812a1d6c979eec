"""Scores at genome scale beside their peers."""
