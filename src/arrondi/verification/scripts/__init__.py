"""Scripts that other interpreters run, one for each consumer. None is imported here, and none knows arrondi."""
