"""Backends that have not run on a GPU yet; where their package is installed, the tuner verifies and times them too."""
