"""What was measured, and the files that hold it."""
