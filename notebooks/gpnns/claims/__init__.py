"""The papers' claims, measured on the mini world."""
