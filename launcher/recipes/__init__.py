"""Ready recipes, and the small data of the quickstart."""
