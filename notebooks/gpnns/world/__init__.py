"""The mini world: what is drawn, told and split."""
