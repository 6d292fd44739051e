"""Which candidate computes a batch."""
