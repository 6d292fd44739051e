"""What surrounds two grouped GEMMs of someone else's over rows sorted by expert: permute, activation, unpermute."""
