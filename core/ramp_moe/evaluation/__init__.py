"""How good choices were."""
