"""Published methods as recipes: one row a method, no logic."""
