"""From data to a grid: fits, searches, and ranges that an observer saw. `grid` owns the value, each other file one way to it."""
