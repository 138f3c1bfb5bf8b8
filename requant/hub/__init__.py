"""The Hugging Face Hub: checkpoints that are read from there, and results that go there."""
