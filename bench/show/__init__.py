"""Results: their file, tables and plots."""
