"""What ``scripts/gpu_check`` runs."""
