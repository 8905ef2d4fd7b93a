"""What a machine has and what each backend needs of it; nothing here imports torch when it is imported."""
