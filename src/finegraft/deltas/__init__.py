"""What changes at a site: one kind of change a file."""
