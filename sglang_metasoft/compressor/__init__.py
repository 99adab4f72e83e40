"""What training makes, and the files that hold it."""
