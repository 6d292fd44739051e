"""How long a candidate will take."""
