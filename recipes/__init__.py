"""Recipes: models, data, YAML files and the command line that train with sparsetrain."""
