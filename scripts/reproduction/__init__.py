"""What ``scripts/reproduce_methods`` trains and compares."""
