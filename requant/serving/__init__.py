"""What it takes to serve a checkpoint: memory on GPUs, what runs where, and which formats fit."""
