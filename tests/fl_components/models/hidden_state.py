"""A module of the user's in which models keep state."""

total = 0.0
