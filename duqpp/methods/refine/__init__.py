"""Learned refinement: weights trained through their rounding, and saved as codes again."""
