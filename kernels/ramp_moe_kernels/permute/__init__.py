"""Dispatch, activation and combine, around two grouped GEMMs of another library over rows sorted by expert."""
