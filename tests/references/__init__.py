"""Slow, literal versions of what src does fast: written from the papers' formulas, one number at a time, sharing no code with it."""
