"""A GPT in llama's shape, trained by plain torch on FSDP2: ``torchrun -m sparsetrain.recipes.llama_fsdp2 --help``."""
